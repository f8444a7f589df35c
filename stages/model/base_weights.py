"""A base's weights under the names that its model in Transformers gives them, whatever its files call them.

Transformers renames tensors when it loads them ("model.language_model.layers" to "model.layers"), and stacks, joins, splits
or transposes some of them: the weights of the experts of a layer are one tensor in the model, and often many in the files.
The same rules are used here, in both directions.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from stages.core.problem import Problem
from stages.model.architecture import skeleton

NAMED = 3
"""The maximum number of tensors that a message names one by one."""


class Conversion(NamedTuple):
    """Tensors of the files that make one or more weights of the model."""

    keys: tuple[str, ...]
    """The names of the tensors in the files, in the order in which they are joined."""
    names: tuple[str, ...]
    """The names of the weights in the model."""
    converter: WeightConverter | None
    """How to convert; None if the one tensor is the one weight."""
    patterns: tuple[str, ...]
    """The source pattern of the converter that each of `keys` matches."""


class BaseWeights:
    """The weights of a model's folder, read from its safetensors files when they are needed."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers of the files, and finds what each tensor is called in the model.

        Args:
            folder: A model's folder, with its manifest.
        """
        self.folder = folder
        self._shards: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    self._shards[key], self._shapes[key] = shard, tuple(file.get_slice(key).get_shape())
        self._model = skeleton(folder, torch.float32)
        self._weights = self._model.state_dict()
        """On the meta device."""
        self._transforms = get_model_conversion_mapping(self._model)
        self._conversions: dict[str, Conversion] = {}
        """By the names of the model."""
        self._own_names: dict[str, str] = {}
        """The names of weights that several modules share, to the one of them that the conversion has."""
        self._find_conversions()

    def __contains__(self, name: str) -> bool:
        """Whether the files have a weight of the model."""
        return name in self._conversions

    def __getitem__(self, name: str) -> torch.Tensor:
        """A weight as the model has it, in the dtype of the files, on the CPU."""
        conversion = self._conversions[name]
        weights = self.to_model(conversion, self.read(conversion.keys))
        return weights[self._own_names.get(name, name)]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a weight in the files. Reads no data."""
        key = self._conversions[name].keys[0]
        with safe_open(self._shards[key], framework="pt") as file:
            nothing: torch.Tensor = file.get_slice(key)[:0]
            return nothing.dtype

    def read(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tensors by their names in the files."""
        tensors: dict[str, torch.Tensor] = {}
        for shard in dict.fromkeys(self._shards[key] for key in keys):
            # Not once for each tensor: the header is parsed each time, which takes 1 ms with 1,200 tensors.
            with safe_open(shard, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in keys if self._shards[key] == shard}
        return {key: tensors[key] for key in keys}

    def read_linear(self, name: str, *, transposed: bool, device: torch.device) -> torch.Tensor:
        """The weight (out, in) of a linear layer in float32.

        Args:
            name: The layer's full name.
            transposed: Whether the files store it as (in, out), see `is_transposed`.
            device: Where to put the weight.
        """
        weight = self[f"{name}.weight"].to(device, torch.float32)
        return weight.T if transposed else weight

    def conversions(self, names: Iterable[str]) -> list[Conversion]:
        """The conversions that make these weights of the model, each once, in the order of the files' tensors."""
        found = {self._conversions[name].keys: self._conversions[name] for name in sorted(names)}
        return list(found.values())

    def to_model(self, conversion: Conversion, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of the model, by name, from tensors of the files, by theirs."""
        if conversion.converter is None:
            return {conversion.names[0]: tensors[conversion.keys[0]]}
        converter = deepcopy(conversion.converter)
        for key, pattern in zip(conversion.keys, conversion.patterns, strict=True):
            converter.add_tensor(conversion.names[0], key, pattern, tensors[key])
        return self._convert(converter, conversion.names[0])

    def to_files(self, conversion: Conversion, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The reverse of `to_model`."""
        if conversion.converter is None:
            return {conversion.keys[0]: weights[conversion.names[0]]}
        backwards = conversion.converter.reverse_transform()
        first = ""
        for name in sorted(weights, key=dot_natural_key):
            renamed, pattern = apply_converters(name, [backwards])
            assert pattern is not None, name
            first = first or renamed
            backwards.add_tensor(renamed, name, pattern, weights[name])
        # The other transforms change the names before the converter does, so they are reversed after it.
        renamings = [each.reverse_transform() for each in reversed(self._transforms) if isinstance(each, WeightRenaming)]
        converted = {
            self._file_key(apply_renamings(name, renamings), conversion.keys): tensor
            for name, tensor in self._convert(backwards, first).items()
        }
        assert converted.keys() == set(conversion.keys), (sorted(converted), conversion.keys)
        return converted

    def check_shapes(self) -> None:
        """Raises Problem if a weight has another shape in the files than config.json says.

        Transformers checks it too, but not for weights that it quantizes.
        """
        problems = []
        for conversion in self.conversions(self._conversions):
            found = self.to_model(conversion, {key: self._empty(key) for key in conversion.keys})
            for name in conversion.names:
                wanted, shape = tuple(self._weights[name].shape), tuple(found[name].shape)
                if shape != wanted:
                    problems.append(f"{self.folder}: {conversion.keys[0]} has the shape {shape}; config.json says {wanted}")
        if problems:
            more = [f"{len(problems) - NAMED} more tensors have another shape than config.json says"] * (
                len(problems) > NAMED
            )
            raise Problem(*problems[:NAMED], *more)

    def require(self, names: Iterable[str], purpose: str) -> None:
        """Raises Problem if the files lack one of these weights, or if `merge` could not write one back.

        Of each kind of conversion one is tried, in both directions.

        Args:
            names: The names of the weights in the model.
            purpose: What they are needed for, "into which merge would merge the adapter".
        """
        names = list(names)
        absent = [name for name in names if name not in self]
        if absent:
            raise Problem(f"{self.folder}: has no tensor for {absent[0]}, {purpose}{_others(absent)}")
        tried = {id(each.converter): each for each in self.conversions(names) if each.converter is not None}
        for conversion in tried.values():
            tensors = self.read(conversion.keys)
            try:
                back = self.to_files(conversion, self.to_model(conversion, dict(tensors)))
                same = all(torch.equal(back[key], tensors[key]) for key in tensors)
            except (AssertionError, KeyError, RuntimeError, TypeError, ValueError):
                same = False
            if not same:
                raise Problem(
                    f"{self.folder}: Transformers makes {conversion.names[0]} of "
                    f"{conversion.keys[0]}{_others(conversion.keys)} in a way that cannot be reversed, {purpose}"
                )

    def _find_conversions(self) -> None:
        """Fills `_conversions`, in the way in which Transformers' loader assigns tensors to weights."""
        renamings = [each for each in self._transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in self._transforms if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        prefix, weights = self._model.base_model_prefix, self._weights
        collected: dict[str, list[tuple[str, str]]] = {}
        for key in sorted(self._shards, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, weights)
            if name not in weights and key in weights:
                name, pattern = rename_source_key(key, [], [], prefix, weights)
            if name in weights:
                collected.setdefault(name, []).append((key, pattern or ""))
        for name, parts in collected.items():
            keys, patterns = (tuple(each) for each in zip(*parts, strict=True))
            converter = by_pattern.get(patterns[0])
            names = self._names_made(name, converter, keys, patterns)
            for each in names:
                self._conversions[each] = Conversion(keys, names, converter, patterns)
        self._transforms = [each for each in self._transforms if each.was_used()]
        self._add_tied()

    def _names_made(
        self, first: str, converter: WeightConverter | None, keys: Sequence[str], patterns: Sequence[str]
    ) -> tuple[str, ...]:
        """The names of all weights that a conversion makes; `first` is the one that Transformers names it by."""
        if converter is None or len(converter.target_patterns) == 1:
            return (first,)
        conversion = Conversion(tuple(keys), (first,), converter, tuple(patterns))
        made = self.to_model(conversion, {key: self._empty(key) for key in keys})
        return tuple(sorted(made, key=dot_natural_key))

    def _empty(self, key: str) -> torch.Tensor:
        """A tensor of the files, on the meta device."""
        return torch.empty(self._shapes[key], device="meta")

    def _add_tied(self) -> None:
        """Adds the other names of weights that several modules of the model share."""
        owners = {id(weight): name for name, weight in self._model.named_parameters() if name in self._conversions}
        for name, weight in self._model.named_parameters(remove_duplicate=False):
            owner = owners.get(id(weight))
            if name not in self._conversions and owner is not None:
                self._conversions[name], self._own_names[name] = self._conversions[owner], owner

    def _convert(self, converter: WeightConverter, name: str) -> dict[str, torch.Tensor]:
        converted = converter.convert(name, model=self._model, config=self._model.config)
        return {each: tensor[0] if isinstance(tensor, list) else tensor for each, tensor in converted.items()}

    @staticmethod
    def _file_key(name: str, keys: Sequence[str]) -> str:
        """The name in the files, which may have a prefix more or less than the reversed rules say."""
        if name in keys:
            return name
        found = [key for key in keys if key.endswith(f".{name}") or name.endswith(f".{key}")]
        return found[0] if len(found) == 1 else name


def _others(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
