"""`Policy`: how the weights of a model split, what its units are, and the options; checked against a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from shardcomp.errors import PolicyError, raise_all
from shardcomp.ir.mesh import Mesh
from shardcomp.policy import toml_reader
from shardcomp.policy.options import Options, option_violations
from shardcomp.policy.patterns import Entry, Violation, claim
from shardcomp.policy.toml_reader import AUTO, FOLDER, ExpectedKernel


@dataclass(frozen=True)
class Policy:
    """What the user asks for: how weights split, what the units are, and the options.

    Example:
        >>> policy = Policy.load("llama", tensor=2)
        >>> policy.options.tensor, policy.options.sequence_parallel
        (2, True)
        >>> policy.mesh(world_size=8).as_dict()
        {'pp': 1, 'dp': 4, 'cp': 1, 'tp': 2}

    Attributes:
        family: the `model_type` of the models that the policy is for.
        weights: the entries of [weights], each a pattern of module paths and how these modules' weights split.
        units: the entries of [units].
        asked: the options that the file and the caller set, by name; `options` has all of them.
        source: what messages call the policy, such as "policies/llama.toml".
        automatic: whether the entries are still to be derived from the model, when it is lowered.
        kernels: the kernels that the file expects.

    Raises:
        PolicyError: every option that is unknown or not legal.
    """

    family: str
    weights: tuple[Entry, ...] = ()
    units: tuple[Entry, ...] = ()
    asked: Mapping[str, Any] = field(default_factory=dict, hash=False)
    source: str = "policy"
    automatic: bool = False
    kernels: tuple[ExpectedKernel, ...] = ()

    def __post_init__(self) -> None:
        raise_all(PolicyError, self.source, option_violations(self.asked) or self._splits_nothing())

    def _splits_nothing(self) -> list[str]:
        tensor = self.options.tensor
        if self.automatic or tensor == 1 or any(entry.value != "whole" for entry in self.weights):
            return []
        return [f"tensor = {tensor}, but no entry of [weights] splits anything: add entries, or use tensor = 1"]

    @cached_property
    def options(self) -> Options:
        """All options. Those that nobody set have their defaults."""
        return Options(**self.asked)

    @staticmethod
    def load(name: str | Path, **options: Any) -> Policy:
        """Read a policy file.

        Args:
            name: a shipped policy such as "llama", the path of a file, or "auto": a policy that is derived from the model when
                it is lowered.
            options: options by name. They win over the file's [options].

        Raises:
            PolicyError: everything that is wrong with the file and the options, or the policies that exist.

        Example:
            >>> Policy.load("llama", tensor=2, zero=1).options.zero
            1
            >>> Policy.load("lama")
            Traceback (most recent call last):
            ...
            shardcomp.errors.PolicyError: no policy 'lama': did you mean 'llama'? There are auto, ...
        """
        if name == AUTO:
            return Policy(AUTO, asked=options, source=AUTO, automatic=True)
        path = toml_reader.find(name)
        source = toml_reader.source_of(path)
        file = toml_reader.read(path.read_bytes(), source, options)
        return Policy(file.family, file.weights, file.units, {**file.options, **options}, source, kernels=file.kernels)

    @staticmethod
    def for_model(model_type: str, **options: Any) -> Policy:
        """The shipped policy for a HuggingFace `model_type`; "auto" where there is none.

        Example:
            >>> Policy.for_model("gpt2").name, Policy.for_model("mamba").name
            ('gpt2', 'auto')
        """
        return Policy.load(toml_reader.families().get(model_type, AUTO), **options)

    @property
    def name(self) -> str:
        """What `load` takes for this policy: the name of a shipped file, or a path."""
        names = (stem for stem, path in toml_reader.shipped().items() if toml_reader.source_of(path) == self.source)
        return next(names, self.source)

    def replace(self, **options: Any) -> Policy:
        """The same policy with these options in place of its own.

        Example:
            >>> Policy.load("llama", tensor=2).replace(tensor=4).options.tensor
            4
        """
        return replace(self, asked={**self.asked, **options})

    def as_dict(self) -> dict[str, Any]:
        """The policy for reports, in plain values: source, family, weights, units, and all options."""
        return {
            "source": self.source,
            "family": self.family,
            "weights": {entry.pattern.text: entry.value for entry in self.weights},
            "units": {entry.pattern.text: entry.value for entry in self.units},
            "options": self.options.as_dict(),
        }

    def expected_kernels(self, layers: int) -> dict[str, int]:
        """Kernel -> how many of it a model with so many layers should have, at least."""
        return {kernel.name: kernel.count * (layers if kernel.per_layer else 1) for kernel in self.kernels}

    def mesh(self, world_size: int) -> Mesh:
        """The mesh over `world_size` ranks. Data parallelism takes the ranks that the other degrees leave.

        Raises:
            PolicyError: the degrees do not make `world_size` ranks.
        """
        options = self.options
        degrees = {"tensor": options.tensor, "pipeline": options.pipeline}
        shown = " and ".join(f"{name} = {size}" for name, size in degrees.items() if size > 1 or name == "tensor")
        model = math.prod(degrees.values())
        if world_size < 1 or world_size % model:
            legal = ", ".join(str(n) for n in range(1, min(world_size, 1024) + 1) if world_size % n == 0)
            degree = "tensor" if options.pipeline == 1 else "pipeline × tensor"
            hint = f": use {degree} = {legal}" if legal else ""
            verb = "does" if options.pipeline == 1 else "do"
            raise PolicyError(f"{self.source}: {shown} {verb} not divide a world of {world_size} ranks{hint}")
        data = world_size // model
        if options.data not in (None, data):
            raise PolicyError(
                f"{self.source}: {shown.replace(' and', ',')} and data = {options.data} make {model * options.data} ranks, "
                f"but the world has {world_size}: use data = {data}, or leave it out"
            )
        if data % options.replicate:
            legal = ", ".join(str(n) for n in range(1, data + 1) if data % n == 0)
            raise PolicyError(f"{self.source}: replicate = {options.replicate} does not divide data = {data}: use {legal}")
        return Mesh(pp=options.pipeline, dp=data, tp=options.tensor, replicas=options.replicate)

    def weight_entries(
        self, parameters: Iterable[str], aliases: Mapping[str, str] | None = None, model_type: str | None = None
    ) -> dict[str, str]:
        """How parameters split: parameter name -> the word of [weights] for its module. The others are absent.

        Args:
            parameters: the names, or a mapping from names to what knows its `module`.
            aliases: other names of tied parameters -> the names under which they are in `parameters`.
            model_type: the model's, for a message where the policy is of another family.

        Raises:
            PolicyError: every entry that does not fit the model.
        """
        words, violations = self._weights(parameters, aliases or {})
        self._raise(violations, self.weights, model_type)
        return words

    def unit_kinds(self, modules: Iterable[str], model_type: str | None = None) -> dict[str, str]:
        """Module path -> kind of unit, for the modules that [units] names, in the order of `modules`.

        Raises:
            PolicyError: every entry that does not fit the model.
        """
        kinds, violations = self._units(modules)
        self._raise(violations, self.units, model_type)
        return kinds

    def check(
        self,
        parameters: Iterable[str],
        modules: Iterable[str],
        aliases: Mapping[str, str] | None = None,
        model_type: str | None = None,
    ) -> None:
        """Raise one PolicyError with everything that `weight_entries` and `unit_kinds` would raise."""
        violations = self._weights(parameters, aliases or {})[1] + self._units(modules)[1]
        self._raise(violations, (*self.weights, *self.units), model_type)

    def _weights(self, parameters: Iterable[str], aliases: Mapping[str, str]) -> tuple[dict[str, str], list[Violation]]:
        known = parameters if isinstance(parameters, Mapping) else {}
        names = {name: name for name in parameters} | dict(aliases)
        modules = {name: known[name].module if name in known else name.rpartition(".")[0] for name in names}
        claims, violations = claim(self.weights, dict.fromkeys(modules.values()))
        # A tied weight is one parameter with several names, whose entries must agree.
        entries: dict[str, tuple[str, Entry]] = {}
        for name, tied_to in names.items():
            entry = claims.get(modules[name])
            if entry is None:
                continue
            first_name, first = entries.setdefault(tied_to, (name, entry))
            if first.value != entry.value:
                text = f"{name} is tied to {first_name}, but {entry} says {entry.value} and {first} says {first.value}: use one"
                violations.append(Violation(text))
        return {name: entry.value for name, (_, entry) in entries.items()}, violations

    def _units(self, modules: Iterable[str]) -> tuple[dict[str, str], list[Violation]]:
        claims, violations = claim(self.units, modules)
        for path, entry in claims.items():
            segments = path.split(".")
            ancestors = (".".join(segments[:end]) for end in range(1, len(segments)))
            outer = next((ancestor for ancestor in ancestors if ancestor in claims), None)
            if outer is not None:
                text = f"{entry} makes {path} a unit inside the unit {outer} of {claims[outer]}: keep one of the two"
                violations.append(Violation(text))
        return {path: entry.value for path, entry in claims.items()}, violations

    def _raise(self, violations: list[Violation], entries: tuple[Entry, ...], model_type: str | None) -> None:
        """Raise the violations. Where most entries match nothing, the policy may be of another family: that comes first."""
        texts = [violation.text for violation in violations]
        unmatched = sum(violation.unmatched for violation in violations)
        if model_type not in (None, self.family) and unmatched * 2 > len(entries):
            files = toml_reader.families()
            advice = (
                f"use {FOLDER}/{files[model_type].name}"
                if model_type in files
                else f"no file has that family: use {AUTO}. {_write_one(files)}"
            )
            texts.insert(0, f"this policy is for the family {self.family!r}, but the model's type is {model_type!r}: {advice}")
        raise_all(PolicyError, self.source, texts)


def _write_one(files: Mapping[str, Path]) -> str:
    names = (path.name if path.stem == family else f"{path.name} ({family})" for family, path in files.items())
    return f"Write one after the example of those in {FOLDER}/ ({', '.join(names)})"
