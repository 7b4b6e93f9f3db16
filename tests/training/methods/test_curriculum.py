"""Curricula: the stage of a step, its random draws, and rejected values."""

import json
import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icae_fast import ICAEConfig
from icae_fast.errors import ConfigError
from icae_fast.training.methods.curriculum import Curriculum, Stage

AE = {"ae": 1.0}
STAGES = st.builds(
    Stage,
    steps=st.integers(1, 5),
    objectives=st.one_of(
        st.just({"warm": 1}),
        st.dictionaries(st.sampled_from(["ae", "lm", "ft"]), st.floats(0.1, 9), min_size=1),
    ),
    max_tokens=st.integers(8, 64),
    min_tokens=st.none() | st.integers(1, 8),
    memory_sizes=st.lists(st.integers(1, 8), max_size=3).map(tuple),
    wrong_tokens=st.floats(0, 1),
    own_tokens=st.floats(0, 1),
)


@given(st.lists(STAGES, min_size=1, max_size=5))
def test_every_step_is_in_its_stage(stages):
    curriculum = Curriculum(stages)
    by_hand = [i for i, stage in enumerate(stages) for _ in range(stage.steps)]
    for step, index in enumerate(by_hand):
        assert curriculum.stage_at(step) == (index, stages[index])
        end = curriculum.ends(step)
        if index == len(stages) - 1:
            assert end == sys.maxsize
        else:
            assert by_hand[step:end] == [index] * (end - step)
            assert by_hand[end] == index + 1
    assert curriculum.total_steps == len(by_hand)
    assert curriculum.stage_at(len(by_hand) + 10**9) == (len(stages) - 1, stages[-1])


@given(st.lists(STAGES, min_size=1, max_size=5))
def test_a_curriculum_goes_through_json(stages):
    read = Curriculum.from_dicts(json.loads(json.dumps(Curriculum(stages).to_dicts())))
    assert read.stages == tuple(stages)


@given(STAGES, st.integers(0, 2**32))
def test_draws_stay_within_the_stage(stage, seed):
    rng = random.Random(seed)
    for _ in range(20):
        assert stage.draw_objective(rng) in stage.objectives
        assert (stage.min_tokens or stage.max_tokens) <= stage.draw_length(rng) <= stage.max_tokens
        size = stage.draw_memory_size(rng)
        assert size in stage.memory_sizes if stage.memory_sizes else size is None


def test_objectives_are_drawn_by_weight():
    stage, rng = Stage(1, {"ae": 3, "lm": 1}, 10), random.Random(0)
    drawn = [stage.draw_objective(rng) for _ in range(4000)]
    assert 0.72 < drawn.count("ae") / len(drawn) < 0.78


def test_growing_begins_with_a_warm_start():
    curriculum = Curriculum.growing([(16, 60), (32, 160)], {"ae": 0.6, "lm": 0.4}, warm_steps=50, shortest=0.5,
                                    memory_sizes=(4, 8))  # fmt: skip
    mix = {"ae": 0.6, "lm": 0.4}
    assert curriculum.stages == (
        Stage(50, {"warm": 1.0}, 16, 8, (4, 8)), Stage(60, mix, 16, 8, (4, 8)), Stage(160, mix, 32, 16, (4, 8)),
    )  # fmt: skip
    assert [s.is_warm for s in curriculum.stages] == [True, False, False]
    assert Curriculum.growing([(16, 60)]).stages == (Stage(60, AE, 16),)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": True}, "steps is True"),
        ({"steps": "5"}, "steps is '5'"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"min_tokens": 11}, "at most max_tokens, 10"),
        ({"min_tokens": 0}, "min_tokens is 0"),
        ({"objectives": {}}, "give weights"),
        ({"objectives": "ae"}, "give weights"),
        ({"objectives": {"as": 1}}, "unknown field as; the fields are ae, lm, ft, warm"),
        ({"objectives": {"warmup": 1}}, "did you mean warm"),
        ({"objectives": {"ae": 0}}, "weight of 'ae' is 0"),
        ({"objectives": {"ae": float("nan")}}, "weight of 'ae' is nan"),
        ({"objectives": {"ae": "1"}}, "weight of 'ae' is '1'"),
        ({"objectives": {"ae": 1, "warm": 1}}, "give it a separate stage"),
        ({"memory_sizes": 4}, "memory_sizes is 4"),
        ({"memory_sizes": [0]}, "entry of memory_sizes is 0"),
        ({"wrong_tokens": 1.5}, "wrong_tokens is 1.5; it must be a number from 0 to 1"),
        ({"wrong_tokens": "0.1"}, "wrong_tokens is '0.1'"),
        ({"own_tokens": -0.1}, "own_tokens is -0.1; it must be a number from 0 to 1"),
        ({"max_token": 4}, "did you mean max_tokens"),
        ({"rounds": 4}, "unknown field rounds"),
    ],
)
def test_bad_stages_are_refused(fields, told):
    with pytest.raises(ConfigError, match=told) as caught:
        Curriculum.from_dicts([{"steps": 1, "objectives": AE, "max_tokens": 10} | fields])
    assert str(caught.value).startswith("stage 0: ")


def test_bad_curricula_are_refused():
    for call, told in [
        (lambda: Curriculum([]), "no stage"),
        (lambda: Curriculum.from_dicts([]), "no stage"),
        (lambda: Curriculum.from_dicts({"steps": 1}), "list of stages"),
        (lambda: Curriculum.from_dicts([3]), "stage 0: a stage is 3"),
        (lambda: Curriculum.from_dicts([{"steps": 1}]), "lacks objectives, max_tokens"),
        (lambda: Curriculum.growing([]), "no stage"),
        (lambda: Curriculum.growing([(0, 5)]), "a length is 0"),
        (lambda: Curriculum.growing([(8, 5)], shortest=0), "shortest is 0"),
    ]:
        with pytest.raises(ConfigError, match=told):
            call()
    with pytest.raises(ValueError, match="counted from 0"):
        Curriculum([Stage(1, AE, 10)]).stage_at(-1)


def test_memory_sizes_have_to_fit_the_adapter():
    config = ICAEConfig(memory_size=8, compression_rate=3)
    Curriculum([Stage(1, AE, 10, memory_sizes=(1, 2, 3, 6, 8))]).check(config)
    for size, told in ((9, "must be 1 to 8"), (5, "cannot be shared by 5")):
        with pytest.raises(ConfigError, match=f"stage 1: .*{told}"):
            Curriculum([Stage(1, AE, 10), Stage(1, AE, 10, memory_sizes=(size,))]).check(config)


def test_the_first_step_that_trains_the_encoder():
    code, warm = Stage(4, {"code": 1}, 8), Stage(2, {"warm": 1}, 8)
    assert Curriculum([warm, code]).first_encoder_step() == 0
    assert Curriculum([code, code, warm]).first_encoder_step() == 8
    assert Curriculum([code]).first_encoder_step() == sys.maxsize
