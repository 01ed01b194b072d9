"""Fresh weights against Megatron-core's own modules, as they fill themselves for a hybrid model; `make test-oracles`.

The linears that these modules build are Transformer Engine's, on CUDA; a stand-in takes the initialiser that it is
handed. Everything else, which initialiser it is among it, is Megatron-core's.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.fresh_weights import cut_super, profile, rows

from .generated import generate

pytestmark = pytest.mark.oracles

SIZES = {"tp": 1, "cp": 1, "ep": 1, "expt_tp": 1, "expt_dp": 1, "tp_cp": 1, "tp_dp_cp": 1}


class Linear(nn.Module):
    """A linear that fills its weight by what it is handed."""

    def __init__(self, inputs: int, outputs: int, *, init_method: Callable[[Tensor], None], **_: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        init_method(self.weight)


def nothing(*_: object, **__: object) -> None:
    """Stand for a module without weights."""


class Group:
    """A process group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.fixture(scope="module")
def core() -> Iterator[Callable[[str], Any]]:
    """Return what imports a module of Megatron-core, with CUDA's part in making modules on a CPU."""
    folder = Path(sys.prefix) / "megatron"
    assert folder.is_dir(), "`make test-oracles` unpacks Megatron-core there"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))

        def module(name: str) -> Any:
            return importlib.import_module(f"megatron.core.{name}")

        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        mamba, moe = module("ssm.mamba_mixer"), module("transformer.moe.moe_layer")
        patch.setattr(mamba, "HAVE_MAMBA_SSM", True)
        patch.setattr(mamba, "get_cuda_rng_tracker", lambda: types.SimpleNamespace(fork=contextlib.nullcontext))
        patch.setattr(moe, "HAVE_TE", True)
        patch.setattr(moe, "TELinear", Linear)
        patch.setattr(moe, "MoEAlltoAllTokenDispatcher", nothing)
        yield module


@pytest.fixture(scope="module")
def made(core: Any) -> tuple[Any, Callable[[str], nn.Module]]:
    """Return the package of Super in a sixteenth of its widths, and what makes Megatron-core's mixer of a symbol."""
    spec = cut_super(16)
    package = generate(spec)
    c = package.Config()
    config = core("transformer.transformer_config").TransformerConfig(
        num_layers=len(c.pattern),
        is_hybrid_model=True,
        init_method_std=c.initializer_range,
        hidden_size=c.hidden_size,
        num_attention_heads=c.attention_num_heads,
        num_query_groups=c.attention_num_kv_heads,
        kv_channels=c.attention_head_dim,
        mamba_num_heads=c.mamba_num_heads,
        mamba_head_dim=c.mamba_head_dim,
        mamba_state_dim=c.mamba_state_size,
        mamba_num_groups=c.mamba_n_groups,
        num_moe_experts=c.moe_num_experts,
        moe_router_topk=c.moe_top_k,
        moe_ffn_hidden_size=c.moe_intermediate_size,
        moe_shared_expert_intermediate_size=c.moe_shared_intermediate_size,
        moe_latent_size=c.moe_latent_size,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        gated_linear_unit=False,
        activation_func=core("activations").squared_relu,
    )
    groups = types.SimpleNamespace(**dict.fromkeys(SIZES, Group()))
    mamba, moe, attention = core("ssm.mamba_mixer"), core("transformer.moe.moe_layer"), core("transformer.attention")
    linears = core("transformer.mlp").MLPSubmodules(linear_fc1=Linear, linear_fc2=Linear)
    parts = moe.MoESubmodules(
        experts=partial(core("transformer.moe.experts").SequentialMLP, submodules=linears),
        shared_experts=partial(core("transformer.moe.shared_experts").SharedExpertMLP, submodules=linears),
    )
    heads = attention.SelfAttentionSubmodules(Linear, nothing, Linear)
    makers: dict[str, Callable[[], nn.Module]] = {
        "M": lambda: mamba.MambaMixer(
            config, mamba.MambaMixerSubmodules(Linear, Linear), c.hidden_size, rmsnorm=False, pg_collection=groups
        ),
        "E": lambda: moe.MoELayer(config, parts, 1, groups),
        "*": lambda: attention.SelfAttention(config, heads, 1, pg_collection=groups),
    }
    return package, lambda symbol: makers[symbol]()


def by_our_names(symbol: str, mixer: nn.Module, sizes: Any) -> dict[str, Tensor]:
    """Return the weights of Megatron-core's mixer by the names of ours."""
    weights = {name: weight.detach() for name, weight in mixer.named_parameters()}
    if symbol == "M":
        return {name.replace("conv1d_", "conv1d."): weight for name, weight in weights.items()}
    if symbol == "*":
        width = sizes.attention_head_dim
        rows = [sizes.attention_num_heads * width, *(2 * [sizes.attention_num_kv_heads * width])]
        qkv = weights["linear_qkv.weight"].split(rows)
        names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
        return dict(zip(names, qkv, strict=True)) | {"o_proj.weight": weights["linear_proj.weight"]}
    renamed = {"router.weight": "gate.weight"}
    renamed |= {f"fc{n}_latent_proj.weight": f"fc{n}_latent_proj.weight" for n in (1, 2)}
    renamed |= {
        f"shared_experts.linear_fc{n}.weight": f"shared_experts.{side}_proj.weight"
        for n, side in ((1, "up"), (2, "down"))
    }
    found = {ours: weights[theirs] for theirs, ours in renamed.items()}
    for n, side in ((1, "up"), (2, "down")):
        experts = range(sizes.moe_num_experts)
        stack = [weights[f"experts.local_experts.{e}.linear_fc{n}.weight"] for e in experts]
        found[f"experts.{side}_proj"] = torch.stack(stack)
    return found


def test_every_weight_of_a_mixer(made: tuple[Any, Callable[[str], nn.Module]]) -> None:
    """Mean and standard deviation to 3 %, the range of the Mamba-2 vectors; of each kind of mixer."""
    package, make = made
    torch.manual_seed(0)
    config = package.Config()
    model = package.Model()
    for symbol in "ME*":
        blocks = [b.mixer for b, s in zip(model.backbone.layers, config.pattern, strict=True) if s == symbol][:8]
        theirs = [by_our_names(symbol, make(symbol), config) for _ in blocks]
        for name, weight in blocks[0].named_parameters():
            if name == "norm.weight":
                continue
            left = torch.stack([block.get_parameter(name).detach() for block in blocks])
            right = torch.stack([found[name].reshape(weight.shape) for found in theirs])
            if name == "A_log":
                left, right = left.exp(), right.exp()
            (low, high, std, mean), (their_low, their_high, their_std, _) = (
                [float(x) for x in (w.min(), w.max(), w.std(), w.mean())] for w in (left, right)
            )
            if weight.dim() == 1 and name != "conv1d.bias":
                assert low == pytest.approx(their_low, rel=0.25, abs=0.3), name
                assert high == pytest.approx(their_high, rel=0.25, abs=0.3), name
                continue
            assert std == pytest.approx(their_std, rel=0.03), name
            assert mean == pytest.approx(0, abs=0.03 * std), name
            assert high / std == pytest.approx(their_high / their_std, rel=0.2), name  # normal, or uniform


def test_activations_by_depth(made: tuple[Any, Callable[[str], nn.Module]], capsys: pytest.CaptureFixture[str]) -> None:
    """Root mean squares of the residual stream over 88 blocks, with our weights and with Megatron-core's: to 10 %."""
    package, make = made
    config = package.Config()
    torch.manual_seed(0)
    ours = package.Model()
    theirs = package.Model()
    with torch.no_grad():
        for block, symbol in zip(theirs.backbone.layers, config.pattern, strict=True):
            for name, weight in by_our_names(symbol, make(symbol), config).items():
                own = block.mixer.get_parameter(name)
                own.copy_(weight.reshape(own.shape))
    left, right = profile(ours), profile(theirs)
    with capsys.disabled():
        print(rows({"`Model()`": left, "Megatron-core": right}))
    torch.testing.assert_close(left, right, rtol=0.1, atol=0)
