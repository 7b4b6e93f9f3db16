"""`Backbone.compile` computes the same slots in one graph, also after weights move, and leaves decoding unchanged."""

import copy

import torch


def test_encoding_is_one_graph_and_gives_the_same(make_icae, random_ids):
    icae = make_icae("llama")
    spans = [random_ids(40), random_ids(23, seed=2)]
    with torch.no_grad():
        expected = [m.slots for m in icae.compress(spans)]
        answer = icae.generate(icae.compress(spans[:1])[0], [[5, 6, 7]], 6, return_ids=True)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    icae.backbone.compile(backend=backend)
    for i in range(2):
        if i:  # moves the parameters apart
            for p in icae.base_model.parameters():
                p.data = copy.deepcopy(p.data)
        for memory, slots in zip(icae.compress(spans), expected, strict=True):
            torch.testing.assert_close(memory.slots, slots)
    assert graphs
    icae.clear_kv()
    assert icae.generate(icae.compress(spans[:1])[0], [[5, 6, 7]], 6, return_ids=True) == answer
