"""What the tests run on: a tiny tokenizer, a two-layer Llama, a few raw rows, and a copy of the project to run them in."""

import contextlib
import copy
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, cached_property, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ruamel.yaml import YAML

PROJECT = Path(__file__).resolve().parents[1]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS, PAD = "<|im_end|>", "<|im_end|>"  # as SmolLM2 has them: one token for both


def load_script(path: str) -> ModuleType:
    """A script of the project, by its path from the root, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, PROJECT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sample() -> ModuleType:
    """data/make_sample.py as a module."""
    return load_script("data/make_sample.py")


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 400 tokens, trained on the sample; saved as Transformers saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    rows = [*sample().rows("en")[:100], *sample().rows("zh")[:100]]
    bpe.train_from_iterator([row["input"] + row["output"] for row in rows], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, bos_token="<|im_start|>")
    tokenizer.chat_template = (PROJECT / "stages/templates/chatml.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)


def make_model(folder: Path, seed: int = 0, **given: Any) -> None:
    """A Llama of two layers, 64 wide (one block of NF4), with tied embeddings, random and in bfloat16; and its tokenizer.

    `given` are other values for LlamaConfig, for example another width.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(folder)
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,  # so that it has opinions, which merging could change
    }
    config = LlamaConfig(**settings | given)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


OTHER_MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "phi3": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 2,
    },
}


def make_other_model(folder: Path, kind: str) -> None:
    """Puts into a base's folder another model for its tokens: two layers, random, in float32, with a head of its own or not.

    gpt2 has Conv1D layers and a tied head; phi3 has fused projections (qkv_proj, gate_up_proj) and an untied one.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=400, bos_token_id=1, eos_token_id=2, initializer_range=0.3, **OTHER_MODELS[kind]
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def compile_as_on_gpu(
    model: Any, monkeypatch: Any, remember: Any = None, *, compiled: Any = lambda function: function
) -> Any:
    """`compile_elementwise` on a CPU: what would be compiled on a GPU is replaced, and computed without the compiler."""
    import torch

    from stages.model import compile as compile_module
    from stages.model.probe import PROBE_ROWS

    class OnGpu:
        device, modules, __call__ = torch.device("cuda"), staticmethod(model.modules), staticmethod(model)

    monkeypatch.setattr(compile_module, "compiled", compiled)
    monkeypatch.setattr(compile_module, "probe_ids", lambda _: torch.tensor([PROBE_ROWS[0]]))
    for code in {sys.modules[type(module).__module__] for module in model.modules()}:
        if hasattr(code, "apply_rotary_pos_emb"):
            monkeypatch.setattr(code, "apply_rotary_pos_emb", code.apply_rotary_pos_emb)  # restored after the test
    return compile_module.compile_elementwise(OnGpu(), remember)


def folder_hash(folder: Path) -> str:
    """What fetch.revision must be for a folder with nothing but a model in it."""
    lines = (
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted(folder.iterdir())
        if file.is_file()
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_raw(folder: Path) -> None:
    """60 good rows in two languages and both file shapes, and four that must be rejected."""
    folder.mkdir(parents=True)
    zh, en = sample().rows("zh")[:30], sample().rows("en")[:30]
    lines = [json.dumps(row, ensure_ascii=False) for row in zh]
    broken = [
        '{"instruction": "cut off',
        json.dumps({"instruction": "a", "output": ""}),
        json.dumps(["no", "object"]),
        lines[0],
    ]
    (folder / "zh.json").write_text("\n".join(lines + broken) + "\n", encoding="utf-8")
    (folder / "en.json").write_text(json.dumps(en), encoding="utf-8")


def overlay(base: Any, patch: Any, at: str = "") -> None:
    """Puts `patch` over `base`. Raises KeyError for a key that `base` lacks, so that fixtures cannot drift."""
    for key, value in patch.items():
        if key not in base:
            raise KeyError(f"{at}{key} is not in params.yaml")
        if isinstance(base[key], dict) and isinstance(value, dict):
            overlay(base[key], value, f"{at}{key}.")
        else:
            base[key] = value


class ProjectFolder:
    """A project folder with a params.yaml, which may be all that it has."""

    def __init__(self, root: Path) -> None:
        self.root, self.yaml = root, YAML()

    def params(self) -> Any:
        return self.yaml.load(self.root / "params.yaml")

    def write(self, params: Any) -> None:
        self.yaml.dump(params, self.root / "params.yaml")


def read_params() -> Any:
    """The project's params.yaml."""
    return YAML().load(PROJECT / "params.yaml")


def params_of_tests() -> Any:
    """params.yaml with the values of tests/fixtures/params.yaml."""
    params = read_params()
    overlay(params, YAML(typ="safe").load(PROJECT / "tests" / "fixtures" / "params.yaml"))
    return params


class Workspace(ProjectFolder):
    """A throw-away copy of the project: the same dvc.yaml and code, small data and a tiny model."""

    def __init__(self, root: Path, model: Path) -> None:
        super().__init__(root)
        from dvc.repo import Repo

        _cache_parsed_yaml()
        listed = subprocess.check_output(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=PROJECT, text=True
        )
        for name in listed.split("\0"):
            if (
                name
                and (PROJECT / name).is_file()
                and (name == "data/prompts.json" or not name.startswith((".dvc/", "data/", "reports/")))
                and name != "dvc.lock"
            ):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(PROJECT / name, root / name)
        shutil.copytree(model, root / "tiny")
        write_raw(root / "data" / "raw")
        Repo.init(str(root), no_scm=True)
        params = params_of_tests()
        params["fetch"]["revision"] = folder_hash(root / "tiny")
        self.write(params)
        self.repo = Repo(str(root))

    @contextlib.contextmanager
    def edited(self, *files: str) -> Iterator[None]:
        """Puts the files back as they were when the block ends."""
        before = {name: (self.root / name).read_bytes() for name in files}
        try:
            yield
        finally:
            for name, data in before.items():
                (self.root / name).write_bytes(data)

    def repro(self, *, force: bool = False) -> list[str]:
        """Runs the pipeline, and returns the stages that ran, in order."""
        with contextlib.chdir(self.root):  # dvc resolves its default target from here
            self.repo._reset()
            return [stage.addressing for stage in self.repo.reproduce(force=force)]

    @cached_property
    def graph(self) -> Any:
        """The stages by name, with an edge from each to those that it needs."""
        import networkx as nx

        with contextlib.chdir(self.root):
            return nx.relabel_nodes(self.repo.index.graph, lambda stage: stage.addressing)

    def stale(self) -> tuple[set[str], set[str]]:
        """The stages that are out of date by themselves, and those together with all that come after them."""
        import networkx as nx

        with contextlib.chdir(self.root):
            direct = set(self.repo.status())
            below = {after for name in direct for after in nx.ancestors(self.graph, name)}
        return direct, direct | below

    def run(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """python -m stages ... in the workspace."""
        command = ["python", "-m", "stages", *arguments]
        return subprocess.run(
            command, cwd=self.root, env=os.environ | (env or {}), capture_output=True, text=True, check=False
        )


@cache
def _cache_parsed_yaml() -> None:
    """DVC reads dvc.yaml and dvc.lock anew at every question, in pure Python, and the tests ask over a hundred."""
    from dvc.utils import strictyaml

    parse = strictyaml.parse_yaml
    parsed = lru_cache(maxsize=8)(lambda text: parse(text, ""))
    strictyaml.parse_yaml = lambda text, path, typ="safe": (
        copy.deepcopy(parsed(text)) if typ == "safe" else parse(text, path, typ)
    )


SLOW_TOKENIZER = '''
import sentencepiece
from transformers import PreTrainedTokenizer


class TinySlowTokenizer(PreTrainedTokenizer):
    """A tokenizer with code of its own and no fast version, as baichuan's."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, add_bos_token=True, **kwargs):
        self.sp_model = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        self.add_bos_token = add_bos_token
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return self.sp_model.get_piece_size()

    def get_vocab(self):
        return {self.sp_model.id_to_piece(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.sp_model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        return self.sp_model.decode(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.bos_token_id] * self.add_bos_token + token_ids_0 + (token_ids_1 or [])
'''


def make_sentencepiece_tokenizer(folder: Path, *, fast: bool) -> None:
    """A small SentencePiece model with byte fallback: as Llama's fast tokenizer, or as a slow one with its own code."""
    import io

    import sentencepiece

    rows = [*sample().rows("en")[:100], *sample().rows("zh")[:100]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([row["input"] + " " + row["output"] for row in rows]),
        model_writer=model,
        vocab_size=700,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    config: dict[str, Any] = {"model_type": "llama"}
    if fast:
        settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True}
    else:
        code = {"AutoTokenizer": ["tiny_slow_tokenizer.TinySlowTokenizer", None]}
        settings |= {"tokenizer_class": "TinySlowTokenizer", "auto_map": code}
        config["auto_map"] = code
        (folder / "tiny_slow_tokenizer.py").write_text(SLOW_TOKENIZER)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config))


PACK_CONFIG = """
from transformers import PretrainedConfig


class TinyPackConfig(PretrainedConfig):
    model_type = "tiny_pack"

    def __init__(self, vocab_size=700, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **kwargs):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, 2 * hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        super().__init__(tie_word_embeddings=False, **kwargs)
"""
PACK_MODEL = '''
import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_tiny_pack import TinyPackConfig


def rotate(x, positions):
    half = x.shape[-1] // 2
    angles = positions[..., None] * 10000.0 ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(nn.Module):
    """Shaped as baichuan's: one product makes query, key and value."""

    def __init__(self, config, number):
        super().__init__()
        size, self.heads, self.number = config.hidden_size, config.num_attention_heads, number
        self.W_pack = nn.Linear(size, 3 * size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.gate_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, size, bias=False)
        self.first_norm, self.second_norm = nn.RMSNorm(size, eps=1e-6), nn.RMSNorm(size, eps=1e-6)

    def forward(self, x, mask, positions, cache):
        rows, tokens, size = x.shape
        packed = self.W_pack(self.first_norm(x)).view(rows, tokens, 3, self.heads, size // self.heads)
        query, key, value = (part.squeeze(2).transpose(1, 2) for part in packed.split(1, 2))
        query, key = rotate(query, positions), rotate(key, positions)
        if cache is not None:
            key, value = cache.update(key, value, self.number)
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.o_proj(out.transpose(1, 2).reshape(rows, tokens, size))
        y = self.second_norm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))


class TinyPackForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TinyPackConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **_):
        cache = past_key_values if past_key_values is not None else DynamicCache() if use_cache else None
        past = cache.get_seq_length() if cache is not None else 0
        rows, tokens = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones(rows, past + tokens, dtype=torch.long, device=input_ids.device)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        causal = torch.ones(tokens, past + tokens, dtype=torch.bool, device=input_ids.device).tril(past)
        mask = causal[None, None] & attention_mask[:, None, None].bool()
        mask = mask | ~mask.any(-1, keepdim=True)  # a padded place looks everywhere, and nobody looks at it
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, mask, position_ids, cache)
        return CausalLMOutputWithPast(logits=self.lm_head(self.norm(x)), past_key_values=cache)
'''


def make_custom_model(folder: Path) -> None:
    """A model with code of its own, shaped as baichuan's (a fused W_pack), with a SentencePiece tokenizer that is slow."""

    import torch
    from safetensors.torch import save_file

    make_sentencepiece_tokenizer(folder, fast=False)
    (folder / "configuration_tiny_pack.py").write_text(PACK_CONFIG)
    (folder / "modeling_tiny_pack.py").write_text(PACK_MODEL)
    code = json.loads((folder / "config.json").read_text())["auto_map"]
    settings = {
        "architectures": ["TinyPackForCausalLM"],
        "model_type": "tiny_pack",
        "auto_map": code
        | {
            "AutoConfig": "configuration_tiny_pack.TinyPackConfig",
            "AutoModelForCausalLM": "modeling_tiny_pack.TinyPackForCausalLM",
        },
        "vocab_size": 700,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    sys.path.insert(0, str(folder.parent))
    try:
        package = importlib.import_module(f"{folder.name}.modeling_tiny_pack")
    finally:
        sys.path.pop(0)
    torch.manual_seed(0)
    model = package.TinyPackForCausalLM(package.TinyPackConfig())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    save_file(
        {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
