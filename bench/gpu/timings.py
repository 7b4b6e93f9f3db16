"""The parts of `bench.gpu.check` that time icae_fast against the baseline in interleaved rounds, with memory peaks."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from bench.gpu.setting import Setting
from bench.harness import encoders
from bench.harness.compare import OURS
from bench.harness.decoders import GENERATE, answer_limits, prompts_for
from bench.harness.models import documents_for, in_adapter_mode, models_for
from bench.harness.shapes import Case, encode_flops
from bench.kernels.shapes import Inputs
from icae_fast.benchmark.checks import TOLERANCE, rms_difference
from icae_fast.benchmark.latency import latency_table
from icae_fast.benchmark.machine import synchronize
from icae_fast.benchmark.measure import interleave, pair_ratios, peak_memory
from icae_fast.core.spans import pack_spans
from icae_fast.model.icae import ICAE

_BACKENDS = "icae_fast.ops.varlen_attention.backends"
Run = Callable[[Setting], dict[str, Any]]

LARGE, LARGE_BYTES = "llama2-7b", 60e9  # room for three copies of its weights and their working memory


def cases(setting: Setting) -> Iterator[Case]:
    """Yield the workloads: the paper's grid among them, with random weights, if the GPU's memory is large enough."""
    if setting.small:
        yield Case("tiny", "fp32", 2, 32, memory_size=8, rank=8, new_tokens=4, prompts=2)
        return
    smollm2 = "smollm2-135m-random" if setting.random else "smollm2-135m"
    yield Case(smollm2, "bf16", 8, 512, new_tokens=128, prompts=8)
    yield Case("llama-1b", "bf16", 8, 512, new_tokens=128, prompts=8)
    if setting.device == "cuda" and torch.cuda.get_device_properties(0).total_memory < LARGE_BYTES:
        return
    for documents, tokens in ((8, 512), (8, 2048), (32, 512)):
        yield Case(LARGE, "bf16", documents, tokens, new_tokens=128, prompts=documents)


def compare(
    calls: Mapping[str, Callable[[], Any]], setting: Setting, difference: Callable[[Any, Any], float] | None = None,
    against: str = encoders.BASELINE,
) -> dict[str, Any]:  # fmt: skip
    """Run every call once to warm up, tune and measure its peak, then time the calls that ran.

    Args:
        calls: calls by provider.
        setting: how the check runs.
        difference: returns the difference of a provider's result from that of `against`, for the report.
        against: the provider whose time is divided by the others'.

    Returns:
        `rows` with `name`, `seconds` (median), `rounds`, `peak_mb`, `times_as_fast` (median, min, max), `difference`;
        `failures` and `tracebacks` of the calls that failed. If a provider other than icae_fast runs out of memory,
        that is one of the `notes`, not a failure.
    """
    failures: list[str] = []
    notes: list[str] = []
    results, peaks, tracebacks = {}, {}, {}
    for name, call in calls.items():
        try:
            call()  # compiles and tunes; this memory does not count as peak
            results[name], peaks[name] = peak_memory(call, setting.device)
        except Exception as error:
            bearable = isinstance(error, torch.OutOfMemoryError) and not name.startswith(OURS)
            said = f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            (notes if bearable else failures).append(said)
            tracebacks[name] = traceback.format_exc()
    timed = {name: _timed(calls[name], setting.device) for name in results}
    seconds = interleave(timed, setting.rounds)
    rows = []
    for name, times in seconds.items():
        row = {"name": name, "seconds": statistics.median(times), "rounds": times, "peak_mb": peaks[name] / 1e6}
        if against in seconds:
            row["times_as_fast"] = pair_ratios(times, seconds[against])
            if difference is not None and name != against:
                row["difference"] = difference(results[name], results[against])
        rows.append(row)
    return {"rows": rows, "failures": failures, "notes": notes, "tracebacks": tracebacks}


def _timed(call: Callable[[], Any], device: str) -> Callable[[], float]:
    def run() -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start

    return run


def _slots(result: Any) -> torch.Tensor:
    return torch.cat([m.slots for m in result]) if isinstance(result, list) else result


def encoding(case: Case) -> Run:
    """Return the part that compresses all documents: icae_fast in both modes, baseline, merged weights, compiled."""

    def run(setting: Setting) -> dict[str, Any]:
        models, documents = models_for(case, setting.device), documents_for(case)
        spans, icae = torch.cat(documents).split(case.span_lengths), models.icae
        calls = {
            encoders.BASELINE: lambda: torch.cat([models.baseline.compress(d) for d in documents]),
            encoders.MERGED: lambda: models.merged.compress(spans),
            encoders.OURS_FUSED: in_adapter_mode(icae, "fused", lambda: icae.compress(documents)),
            encoders.OURS_MERGED: in_adapter_mode(icae, "merged", lambda: icae.compress(documents)),
        }
        if not setting.small:
            calls[encoders.COMPILED] = lambda: models.compiled.compress(spans)
        models.baseline, models.merged  # noqa: B018  (built here, so that weights do not count as peak memory)
        result = compare(calls, setting, lambda a, b: rms_difference(_slots(a).cpu(), _slots(b).cpu()))
        tolerance = TOLERANCE[case.torch_dtype] * (1.0 if case.shape.bundled else encoders.RANDOM_TOLERANCE)
        _judge(result, tolerance, "slots")
        flops = encode_flops(case.shape, case.span_lengths, case.memory_size, case.rank)
        for row in result["rows"]:
            row["least_tflops"] = flops / row["seconds"] / 1e12
        return result

    return run


def _judge(result: dict[str, Any], tolerance: float, what: str) -> None:
    """Add a failure for each row of icae_fast whose difference is over the tolerance."""
    for row in result["rows"]:
        if row["name"].startswith(OURS) and row.get("difference", 0.0) > tolerance:
            result["failures"].append(
                f"{what} of {row['name']} differ by {row['difference']:.2e}, over {tolerance:.0e}"
            )


def answering(case: Case) -> Run:
    """Return the part that answers a prompt about each memory: icae_fast in one batch, the baseline one document."""

    def run(setting: Setting) -> dict[str, Any]:
        models, documents, prompts = models_for(case, setting.device), documents_for(case), prompts_for(case)
        icae, baseline, limits = models.icae, models.baseline, answer_limits(case)
        memories = icae.compress(documents)
        prefix, suffix = icae.prompt_ids(prompts[0])

        def ours(n: int) -> list[list[int]]:
            icae.clear_kv()
            return icae.generate(memories[:n], prompts[:n], return_ids=True, **limits)

        calls = {
            "baseline, one document": lambda: baseline.generate(
                memories[0].slots, suffix, prefix, eos_ids=icae.eos_token_ids, **limits
            ),
            f"{OURS}, one document": lambda: ours(1),
            f"{OURS}, {len(memories)} documents": lambda: ours(len(memories)),
        }
        calls[f"{GENERATE} of transformers, one document"] = lambda: icae.base_model.generate(
            **icae.generation_inputs(memories[0], [prompts[0]], max_new_tokens=case.new_tokens), do_sample=False
        )
        result = compare(calls, setting, against="baseline, one document")
        for row in result["rows"]:
            row["ms_a_token"] = row["seconds"] / case.new_tokens * 1e3
        return result

    return run


def latency(case: Case) -> Run:
    """Return the part that measures the table of `icae-fast bench latency`."""

    def run(setting: Setting) -> dict[str, Any]:
        models = models_for(case, setting.device)
        prompt = prompts_for(case)[0]
        arguments = (models.icae, documents_for(case)[0], prompt, case.new_tokens, setting.rounds)
        return {"table": latency_table(*arguments, baseline=models.baseline)}

    return run


def training(case: Case) -> Run:
    """Return the part that runs `icae(...)["loss"].backward()` on one document, like the baseline."""

    def run(setting: Setting) -> dict[str, Any]:
        models, document = models_for(case, setting.device), documents_for(case)[0][:2048]
        row, labels = _autoencoding(models.icae, document)
        inputs = [t[None].to(setting.device) for t in (document, row, labels)]

        def step(model: torch.nn.Module) -> torch.Tensor:
            model.zero_grad(set_to_none=True)
            loss = model(*inputs)["loss"]
            loss.backward()
            return loss.detach()

        try:
            calls = {encoders.BASELINE: lambda: step(models.baseline), OURS: lambda: step(models.icae)}
            result = compare(calls, setting, lambda a, b: float((a - b).abs() / b.abs()))
        finally:
            for model in (models.baseline, models.icae):
                model.zero_grad(set_to_none=True)
        _judge(result, TOLERANCE[case.torch_dtype], "the loss")
        return result

    return run


def _autoencoding(icae: ICAE, document: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a row of memory ids, AE and the document, and its labels."""
    v, k = icae.vocabulary, icae.config.memory_size
    n = -(-len(document) // icae.config.max_span_tokens) * k
    memory = torch.arange(v.first_memory, v.ae).repeat(n // k)
    row = torch.cat((memory, torch.tensor([v.ae]), document))
    return row, torch.cat((torch.full((n + 1,), -100), document))


def compiled(case: Case) -> Run:
    """Return the part that runs the backbone under `torch.compile(fullgraph=True)`, against the eager one."""

    def run(setting: Setting) -> dict[str, Any]:
        torch.compiler.reset()
        icae, lengths = models_for(case, setting.device).icae, case.span_lengths[:4]
        rows = pack_spans(lengths, icae.config).to(icae.device)
        x = Inputs(icae.dtype, setting.device, torch.Generator(setting.device).manual_seed(1)).floats(
            len(rows.positions), icae.backbone.hidden_size
        )
        lora = icae.adapter.pack(icae.dtype, dropout=False)
        icae.backbone.pack()
        graph = torch.compile(
            lambda x: icae.backbone.forward(x, rows, lora), fullgraph=True, dynamic=False,
            backend="inductor" if setting.device == "cuda" else "aot_eager",
        )  # fmt: skip
        with torch.no_grad():
            calls = {"eager": lambda: icae.backbone.forward(x, rows, lora), f"{OURS} compiled": lambda: graph(x)}
            result = compare(calls, setting, rms_difference, against="eager")
        _judge(result, TOLERANCE[case.torch_dtype], "hidden states")
        return result

    return run


def attention_backends(case: Case) -> Run:
    """Return the part that runs one layer's attention with each installed backend and with torch's."""

    def run(setting: Setting) -> dict[str, Any]:
        s, tokens = case.shape, case.span_lengths[0] + case.memory_size
        generator = torch.Generator(setting.device).manual_seed(1)
        rows = [(tokens, tokens)] * len(case.span_lengths)
        arguments = Inputs(case.torch_dtype, setting.device, generator).varlen_attention(s, rows)
        call, n = torch.ops.icae_fast.varlen_attention, len(rows)

        def torch_sdpa() -> torch.Tensor:
            q, k, v = (arguments[x].unflatten(0, (n, tokens)).transpose(1, 2) for x in "qkv")
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).flatten(0, 1)

        calls = {"sdpa": torch_sdpa, OURS: lambda: call(**arguments)[0]}
        calls |= {f"{OURS}, {name}": _with_backend(name, calls[OURS]) for name in _backend_names(setting)}
        with torch.no_grad():
            result = compare(calls, setting, rms_difference, against="sdpa")
        _judge(result, 2e-2 if case.torch_dtype != torch.float32 else 1e-5, "results")
        result["installed"] = {"flash-attn": importlib.util.find_spec("flash_attn") is not None}
        return result

    return run


def _backend_names(setting: Setting) -> list[str]:
    """Return the attention backends that are installed."""
    if setting.device != "cuda" or importlib.util.find_spec(_BACKENDS) is None:
        return []
    installed = importlib.util.find_spec("flash_attn") is not None
    return ["triton", "torch", *(["flash_attn"] if installed else [])]


def _with_backend(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        choose = importlib.import_module(_BACKENDS).set_attention_backend
        choose(name)
        try:
            return call()
        finally:
            choose(None)

    return run
