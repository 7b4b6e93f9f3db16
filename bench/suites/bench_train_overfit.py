"""Overfit a new adapter on eight passages: the final loss, and whether their slots restore them."""

import math
import time

from bench.harness.overfit import Overfit, learn, new_icae, passages_for, restored
from bench.suites.bench_train import OPS
from icae_fast import backend_of


def test_overfit(compare, overfit_case):
    case, icae = overfit_case, new_icae(overfit_case)
    passages = passages_for(case, icae)
    icae.compress(passages[0])  # packs the weights

    def run():
        return learn(case, icae, passages), restored(icae, passages)

    start = time.perf_counter()
    learned, exact = compare.benchmark.pedantic(run, rounds=1)
    seconds = time.perf_counter() - start
    assert all(map(math.isfinite, learned["warm_losses"] + learned["losses"]))
    assert learned["losses"][-1] < learned["losses"][0]
    backends = {op: backend_of(op, icae.device) for op in OPS}
    compare.report(Overfit(compare.benchmark.name, case, learned, exact, seconds, backends))
