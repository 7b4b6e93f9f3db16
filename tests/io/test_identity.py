"""The identity of a base model: what is another model, and what is the same one in another dtype."""

import copy
import json

import pytest
import torch

from icae_fast.errors import BaseModelMismatchError
from icae_fast.io.identity import base_identity, check_base, compare_identities

pytestmark = pytest.mark.usefixtures("one_thread")


def names_of(model):
    return {name.split(".", 3)[-1] if ".layers." in name else name for name, _ in model.named_parameters()}


def changed(model, chosen, amount=0.05):
    """Return a copy with noise on the parameters whose name a predicate accepts."""
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if chosen(name):
                parameter.add_(torch.randn_like(parameter), alpha=amount)
    return other


@pytest.mark.parametrize("kind", ["llama3", "qwen3"])
def test_a_model_that_differs_in_one_kind_of_parameter_is_another(make_base, kind):
    base = make_base(kind)
    identity = base_identity(base)
    for name in names_of(base):
        with pytest.raises(BaseModelMismatchError, match="other weights"):
            check_base(changed(base, lambda n, end=name: n.endswith(end)), identity, "it")


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("part", ["", "self_attn.v_proj", "mlp.up_proj"])
def test_a_model_that_differs_in_one_layer_or_one_tensor_is_another(make_base, layer, part):
    base = make_base()
    with pytest.raises(BaseModelMismatchError, match=r"other weights .*pass the base model it was trained on"):
        check_base(changed(base, lambda name: f"layers.{layer}.{part}" in name, 0.5), base_identity(base), "it")


def test_rounding_to_another_dtype_changes_nothing_that_counts(make_base):
    base = make_base(num_hidden_layers=9)
    identity = json.loads(json.dumps(base_identity(base)))
    for other in (base.double(), base.float().half(), base.float().half().bfloat16()):
        check_base(other, identity, "it")


def test_identities_of_the_first_version_are_compared_by_what_they_have(make_base):
    base = make_base()
    old = {name: value for name, value in base_identity(base).items() if name != "fingerprint_v2"}
    check_base(changed(base, lambda name: "k_proj" in name), old, "it")
    compare_identities(old, base_identity(base), "it")
    with pytest.raises(BaseModelMismatchError, match="of the sampled ones agree"):
        check_base(make_base(seed=1), old, "it")


@pytest.mark.parametrize("value", [7, [], {}, {"norm": 3}, {"norm": "?"}])
def test_a_damaged_fingerprint_is_none_of_this_model(make_base, value):
    base = make_base()
    identity = base_identity(base)
    whole = identity["fingerprint_v2"]
    for damaged in (value, whole | value) if isinstance(value, dict) and value else (value,):
        with pytest.raises(BaseModelMismatchError, match="pass the base model it was trained on"):
            check_base(base, identity | {"fingerprint_v2": damaged}, "it")
