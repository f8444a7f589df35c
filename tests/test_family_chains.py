"""The chain of stages on checkpoints of very different architectures, as the hub has them. tools/sweep.py takes all."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import chain
from tests.families import FAMILIES, REFUSED, write_release

CHAINS = [
    "phi3_code",  # fused projections, code in the repository that must not run
    "gpt2",  # Conv1D, names without the model's prefix, a tied head
    "falcon",  # attention of its own, layers that are no nn.Linear
    "qwen3_moe",  # experts in several files
    "deepseek_v3",  # latent attention, shared experts
    "granite4_moe",  # Mamba 2, attention and experts
    "rwkv",  # padding goes into its state
    "qwen3_5",  # linear attention in a wrapper, layers that Transformers does not load
    "gemma3",  # windows in a wrapper
    "mistral3",  # a wrapper that AutoModelForCausalLM does not know
    "gpt_oss_mxfp4",  # experts that come in MXFP4, attention sinks
    "llama_bnb_4bit",  # weights that come in NF4
]


@pytest.fixture
def release(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A family's checkpoint. Checkpoints of stages stand in the test's folder too."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    write_release(FAMILIES[request.param], tmp_path / "release")
    (tmp_path / "run").mkdir()
    return tmp_path / "release"


@pytest.mark.parametrize("release", CHAINS, indirect=True)
def test_everything_that_comes_out_is_what_transformers_and_peft_compute(release: Path) -> None:
    facts: dict[str, Any] = {}
    chain.run_chain(release, release.parent / "run", facts)
    assert facts["changed"] > 0.9
    assert facts["experts"] in (None, 1.0)


@pytest.mark.parametrize("release", REFUSED, indirect=True)
def test_what_cannot_be_trained_is_refused_before_the_training(release: Path, request: pytest.FixtureRequest) -> None:
    with pytest.raises(chain.Refused) as refused:
        chain.run_chain(release, release.parent / "run", {})
    assert REFUSED[request.node.callspec.params["release"]] in str(refused.value)


@pytest.mark.parametrize("release", ["mistral_window"], indirect=True)
def test_the_checks_find_what_is_wrong(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = release.parent / "run"
    chain.run_chain(release, run, {})
    base, merged, adapter = run / "base", run / "merged", run / "adapter"

    def spoil(name: str, change: Any) -> Path:
        folder = release.parent / "spoiled"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(merged, folder)
        weights = load_file(folder / "model.safetensors")
        change(weights, name)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    def flip_a_bit(weights: dict[str, torch.Tensor], name: str) -> None:
        weights[name].view(torch.int32).view(-1)[5] ^= 1

    flipped = spoil("model.norm.weight", flip_a_bit)
    with pytest.raises(chain.Failed, match=r"neither adapted nor quantized: \['model.norm.weight'\]"):
        chain.check_merged(base, flipped, adapter)
    lost = spoil("model.norm.weight", lambda weights, name: weights.pop(name))
    with pytest.raises(chain.Failed, match=r"other tensors: \['model.norm.weight'\]"):
        chain.check_merged(base, lost, adapter)
    scaled = spoil("model.layers.0.self_attn.q_proj.weight", lambda weights, name: weights[name].mul_(1.1))
    with pytest.raises(chain.Failed, match=r"mean KL from the trained one"):
        chain.check_trained_is_merged(base, scaled, adapter, report=run / "train.json")
    with pytest.raises(chain.Failed, match=r"differs from Transformers' at token"):
        chain.check_answers(base, run)  # the answers are the merged model's

    from stages.model import padding_free

    with monkeypatch.context() as patch:
        patch.setattr(padding_free, "logits_match", lambda *_: True)
        patch.setattr(padding_free.RowLayout, "longest", 1, raising=False)
        plain = padding_free._causal_attention
        patch.setattr(padding_free, "_causal_attention", lambda *args, **named: plain(*args, **named | {"window": None}))
        with pytest.raises(chain.Failed, match=r"logits of rows in a padding-free batch differ"):
            chain.check_training(chain.train_params(), base, adapter, {})
