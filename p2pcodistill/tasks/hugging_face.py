"""Causal language models that the library `transformers` builds from a configuration, with random weights.

Nothing is downloaded, and no code of a configuration's author is run: an architecture is one that the installed library has.
The library is optional and imported when it is needed.

Axes of tensors: B documents (streams), T tokens of a window, V tokens of the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from p2pcodistill.errors import ConfigError
from p2pcodistill.task_configs import LanguageModelConfig

_MAX_CONFIG_BYTES = 1 << 20
_MAX_SHOWN_CHARS = 200
# They choose who computes, and the library takes the name of a repository of the hub, whose code it fetches and runs.
_CODE_KEYS = frozenset({"attn_implementation", "experts_implementation"})


class HuggingFaceModel(nn.Module):
    """Called as `model(tokens_BT, state)`, like a recurrent model; the state is None."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens_BT: Tensor, state: None = None) -> tuple[Tensor, None]:
        """(logits_BTV, None): each token is predicted from those before it in the window."""
        logits_BTV: Tensor = self.network(input_ids=tokens_BT, use_cache=False).logits
        return logits_BTV, None


def make_hugging_face_model(config: LanguageModelConfig, num_tokens: int) -> HuggingFaceModel:
    """The model of `config.architecture`, for a vocabulary of `num_tokens`, from torch's random state.

    Raises ConfigError where the library is missing, or does not know the architecture or one of its options.
    """
    architecture = str(config.architecture)
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"the architecture {architecture!r} needs the library transformers: "
            "pip install 'p2pcodistill[language-model]'"
        ) from None
    model_type, options = _read_architecture(architecture)
    options |= config.architecture_options
    for key in _keys_in(options):
        if key.lstrip("_").removesuffix("_internal") in _CODE_KEYS:
            raise ConfigError(
                f"the architecture {architecture!r} has {key!r}, which may name code to be downloaded: remove it"
            )
    try:
        known = transformers.AutoConfig.for_model(model_type)
        for key in config.architecture_options:
            if not hasattr(known, key):
                raise ConfigError(f"the architecture {architecture!r} has no option {key!r}")
        # Tokens of a vocabulary that is not this one mean nothing here; a padding token would never be learnt.
        options |= {
            "vocab_size": num_tokens,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        described = transformers.AutoConfig.for_model(model_type, **options)
        window = getattr(described, "max_position_embeddings", None)
        if isinstance(window, int) and window < config.window_tokens:
            raise ConfigError(
                f"the architecture {architecture!r} has {window} positions: lower task.window_tokens "
                f"({config.window_tokens}) to that, or raise its max_position_embeddings in task.architecture_options"
            )
        factory: Any = transformers.AutoModelForCausalLM  # partly without types
        network = factory.from_config(described, trust_remote_code=False)
        is_causal = _is_causal(network)
    except ConfigError:
        raise
    except Exception as error:  # whatever the library or the architecture makes of options that do not fit
        raise ConfigError(
            f"transformers cannot build the architecture {architecture!r}: {_first_line(error)}"
        ) from None
    if not is_causal:
        raise ConfigError(
            f"the architecture {architecture!r} is not causal, it sees what it is to predict: choose another, or set what "
            "makes it causal (is_decoder = true, for many) in task.architecture_options"
        )
    return HuggingFaceModel(network.float())


@torch.no_grad()
def _is_causal(network: nn.Module) -> bool:
    """Whether a prediction stays as it is when what comes behind it changes."""
    network.eval()
    tokens_BT = torch.tensor([[0, 1, 2], [0, 1, 3]])
    logits_BTV = network(input_ids=tokens_BT, use_cache=False).logits
    network.train()
    return torch.allclose(logits_BTV[0, :2], logits_BTV[1, :2], rtol=1e-3, atol=1e-4)


def _read_architecture(architecture: str) -> tuple[str, dict[str, Any]]:
    """The model type and the options of a model type's name, or of a configuration file."""
    if not architecture.endswith(".json"):
        return architecture, {}
    path = Path(architecture)
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} is larger than 1 MiB: not a model's config.json")
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path} is not JSON text: give a model's config.json") from None
    model_type = table.pop("model_type", None) if isinstance(table, dict) else None
    if not isinstance(model_type, str):
        raise ConfigError(f"{path} names no model_type: give a model's config.json")
    table.pop("auto_map", None)  # where its author's own code is
    return model_type, table


def _keys_in(value: Any) -> Iterator[str]:
    """The keys of a table and of all tables in it, however deep."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            yield from value
            values += value.values()
        elif isinstance(value, list):
            values += value


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:_MAX_SHOWN_CHARS] if text else type(error).__name__
