"""Architectures of the library `transformers`: built from a configuration alone, and refused in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from p2pcodistill.checkpoint.snapshot import take_snapshot
from p2pcodistill.errors import ConfigError
from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.tasks.hugging_face import make_hugging_face_model

OPTIONS = {
    "gpt2": {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16},
    "llama": {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    },
}


def config_of(architecture: str, **options: Any) -> LanguageModelConfig:
    return LanguageModelConfig(
        model="hugging-face", architecture=architecture, architecture_options=options, window_tokens=8
    )


@pytest.mark.parametrize("model_type", sorted(OPTIONS))
def test_an_architecture_is_built_by_its_name_with_random_weights(model_type: str) -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(make_hugging_face_model(config_of(model_type, **OPTIONS[model_type]), 300).eval())
    tokens_BT = torch.randint(300, (2, 8))
    logits = [model(tokens_BT, None)[0] for model in models]
    assert logits[0].shape == (2, 8, 300)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    changed_BT = tokens_BT.clone()
    changed_BT[:, 5] = (changed_BT[:, 5] + 1) % 300
    torch.testing.assert_close(models[0](changed_BT)[0][:, :5], logits[0][:, :5])
    assert take_snapshot(models[0], 0).tensors


def test_a_configuration_file_is_read_and_its_authors_code_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    (tmp_path / "modeling.py").write_text("raise SystemExit('this must not run')")
    path.write_text(
        json.dumps(
            {
                "model_type": "gpt2",
                "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
                "vocab_size": 7,
                "n_layer": 3,
                "n_embd": 16,
                "n_head": 2,
            }
        )
    )
    network = make_hugging_face_model(config_of(str(path), n_layer=2), 300).network
    assert type(network).__module__.startswith("transformers.")
    assert (network.config.n_layer, network.config.n_embd, network.config.vocab_size) == (2, 16, 300)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("gtp2", {}, "cannot build the architecture 'gtp2'"),
        ("bert", {"n_layer": 1}, "'bert' has no option 'n_layer'"),
        ("t5", {}, "cannot build the architecture 't5'"),
        ("gpt2", {"n_embd": 15, "n_head": 2}, "cannot build the architecture 'gpt2'"),
        ("gpt2", {"n_positions": 4}, r"'gpt2' has 4 positions: lower task.window_tokens \(8\)"),
        ("missing.json", {}, "cannot read missing.json: No such file"),
    ],
)
def test_what_cannot_be_built_is_one_line(architecture: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        make_hugging_face_model(config_of(architecture, **options), 300)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_experts_implementation_internal"]
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_who_computes_is_not_chosen_by_a_configuration(tmp_path: Path, key: str, is_nested: bool) -> None:
    path = tmp_path / "config.json"
    named = {key: "somebody/kernel"}
    path.write_text(
        json.dumps({"model_type": "gpt2"} | ({"list": [{"inner": named}]} if is_nested else named))
    )
    with pytest.raises(ConfigError, match=f"has '{key}', which may name code to be downloaded: remove it"):
        make_hugging_face_model(config_of(str(path)), 300)
    options = {"text_config": named} if is_nested else named
    with pytest.raises(ConfigError, match=f"has '{key}', which may name code to be downloaded: remove it"):
        make_hugging_face_model(config_of("gpt2", **options), 300)


def test_a_model_that_sees_what_it_is_to_predict_is_refused() -> None:
    small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(ConfigError, match="'bert' is not causal"):
        make_hugging_face_model(config_of("bert", **small), 300)
    make_hugging_face_model(config_of("bert", is_decoder=True, **small), 300)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": 3}', "[" * 100_000])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json .*: give a model's config\.json"):
        make_hugging_face_model(config_of(str(path)), 300)


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'p2pcodistill\[language-model\]'"):
        make_hugging_face_model(config_of("gpt2"), 300)
