"""What a method is told of each tensor: a recipe's parameters, by their gradients and filters, as the method's Config.

A setting is looked for in the source's parameters, then the slice's, the module's, and the recipe's; the first that
says something of the tensor counts. A list of numbers is a gradient: linear between them over the slice's layers (t
from 0 to 1). In a list of {filter, value} the first whose filter is part of the tensor's name counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from lfm.core.errors import ConfigError

REQUIRED = object()


class Parameter(NamedTuple):
    """kind: float, int or bool. of: one for all, one for each input, or one for each input but the base."""

    kind: type
    default: Any = REQUIRED
    of: Literal["all", "input", "tuned"] = "all"


class Language(NamedTuple):
    """How mergekit speaks of a method, and what that means to it.

    base: what it does with the base: input, it is a model like others; first, it is the first of them. settings:
    resolved parameters → the method's own settings. most, least: how many inputs, less a base with a role of its own.
    """

    parameters: Mapping[str, Parameter]
    base: Literal["required", "optional", "input", "first"]
    settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    most: int | None = None
    least: int = 1

    @property
    def passes_base(self) -> bool:
        """Whether a slice of the base alone is the base."""
        return self.base == "required" and self.most is None and self.least == 1

    @property
    def adds_base(self) -> bool:
        """Whether whole models are merged with the base too where it is not among them: not if it needs a weight."""
        asked = any(p.of == "input" and p.default is REQUIRED for p in self.parameters.values())
        return self.base != "input" or not (asked or self.most == 1)


def _arithmetic(normalize: bool, rescale: bool, **more: Parameter) -> dict[str, Parameter]:
    return {
        "int8_mask": Parameter(bool, False),
        "normalize": Parameter(bool, normalize),
        "rescale": Parameter(bool, rescale),
        "lambda": Parameter(float, 1.0),
        "weight": Parameter(float, of="tuned"),
        "density": Parameter(float, 1.0, "tuned"),
        **more,
    }


def _sum(told: Mapping[str, Any]) -> dict[str, Any]:
    return {"weights": told["weight"], "scale": told["lambda"], "normalize": told["normalize"]}


def _trimmed(told: Mapping[str, Any]) -> dict[str, Any]:
    return {**_sum(told), "density": told["density"], "rescale": told["rescale"]}


def _by_rank(told: Mapping[str, Any]) -> dict[str, Any]:
    return {**_trimmed(told), "epsilon": told["epsilon"], "rescale": "norm" if told["rescale"] else "none"}


ELECTED = {"cancelled": "positive"}
GAMMA, EPSILON = Parameter(float, 0.01, "tuned"), Parameter(float, 0.15, "tuned")
WEIGHT = Parameter(float, of="tuned")

LANGUAGE: Mapping[str, Language] = {
    "linear": Language(
        {"weight": Parameter(float, of="input"), "normalize": Parameter(bool, True)},
        "input",
        lambda told: {"weights": told["weight"], "normalize": told["normalize"]},
    ),
    "passthrough": Language(
        {"scale": Parameter(float, 1.0, "input")}, "input", lambda told: {"scale": told["scale"][0]}, most=1
    ),
    "karcher": Language(
        {"max_iter": Parameter(int, 10), "tol": Parameter(float, 1e-5)},
        "input",
        lambda told: {"max_iter": told["max_iter"], "tol": told["tol"]},
    ),
    "slerp": Language({"t": Parameter(float)}, "first", lambda told: {"t": told["t"]}, most=1),
    "nuslerp": Language(
        {
            "weight": WEIGHT,
            "nuslerp_row_wise": Parameter(bool, False),
            "nuslerp_flatten": Parameter(bool, True),
        },
        "optional",
        lambda told: {
            "weights": told["weight"],
            "of": "tensor" if told["nuslerp_flatten"] else "column" if told["nuslerp_row_wise"] else "row",
        },
        most=2,
        least=2,
    ),
    "multislerp": Language(
        {"weight": WEIGHT, "normalize_weights": Parameter(bool, True), "eps": Parameter(float, 1e-8)},
        "optional",
        lambda told: {"weights": told["weight"], "normalize": told["normalize_weights"]},
        least=2,
    ),
    "model_stock": Language(
        {"filter_wise": Parameter(bool, False)},
        "required",
        lambda told: {"of": "row" if told["filter_wise"] else "tensor"},
        least=2,
    ),
    "nearswap": Language({"t": Parameter(float)}, "required", lambda told: {"t": told["t"]}, most=1),
    "arcee_fusion": Language({}, "required", lambda told: {}, most=1),
    "sce": Language(
        {"int8_mask": Parameter(bool, False), "select_topk": Parameter(float, 1.0)},
        "required",
        lambda told: {"density": told["select_topk"]},
    ),
    "ram": Language({"epsilon": Parameter(float, 1e-5)}, "required", lambda told: {"epsilon": told["epsilon"]}),
    "ramplus_tl": Language(
        {"r": Parameter(float, 0.1), "alpha": Parameter(float, 0.2), "epsilon": Parameter(float, 1e-5)},
        "required",
        lambda told: {"r": told["r"], "alpha": told["alpha"], "epsilon": told["epsilon"]},
    ),
    "task_arithmetic": Language(_arithmetic(False, False), "required", _sum),
    "ties": Language(
        _arithmetic(True, False), "required", lambda told: {**_trimmed(told), **ELECTED, "scope": "tensor"}
    ),
    "dare_linear": Language(_arithmetic(False, True), "required", _trimmed),
    "dare_ties": Language(_arithmetic(False, True), "required", lambda told: {**_trimmed(told), **ELECTED}),
    "breadcrumbs": Language(
        _arithmetic(False, False, gamma=GAMMA), "required", lambda told: {**_trimmed(told), "gamma": told["gamma"]}
    ),
    "breadcrumbs_ties": Language(
        _arithmetic(False, False, gamma=GAMMA),
        "required",
        lambda told: {**_trimmed(told), "gamma": told["gamma"], **ELECTED},
    ),
    "della": Language(_arithmetic(True, True, epsilon=EPSILON), "required", lambda told: {**_by_rank(told), **ELECTED}),
    "della_linear": Language(_arithmetic(False, True, epsilon=EPSILON), "required", _by_rank),
}
"""mergekit's methods: their parameters with mergekit's defaults, and what lfm's methods of the same name call them."""

UNHEEDED = ("int8_mask", "eps")
"""Parameters of mergekit's that save its memory, or that lfm has no need of."""

SPOKEN = tuple(dict.fromkeys(name for language in LANGUAGE.values() for name in language.parameters))


def language(method: str) -> Language:
    """mergekit's way of speaking of a method. ConfigError for one that it does not have."""
    if method not in LANGUAGE:
        near = get_close_matches(method, LANGUAGE, n=1)
        raise ConfigError(
            f"mergekit has no merge_method {method!r}",
            fix=f"did you mean {near[0]!r}?" if near else f"its methods: {', '.join(LANGUAGE)}",
        )
    return LANGUAGE[method]


def check(method: str, parameters: Mapping[str, Any], where: str, *, of_model: bool = False) -> list[str]:
    """The parameters that this method does not use there. ConfigError for one that no method has.

    of_model: they stand with one model, where what is for all has no meaning.
    """
    unused = []
    for name in parameters:
        known = language(method).parameters.get(name)
        if known and name not in UNHEEDED and not (of_model and known.of == "all"):
            continue
        if name not in SPOKEN:
            near = get_close_matches(name, SPOKEN, n=1)
            raise ConfigError(
                f"{where} has parameter {name!r}",
                why=f"{method} takes {', '.join(language(method).parameters) or 'none'}",
                fix=f"did you mean {near[0]!r}?" if near else "leave it out",
            )
        unused.append(f"{name} of {where}" if known and name not in UNHEEDED else name)
    return unused


class Place(NamedTuple):
    """A tensor of the result as settings see it. names: what it is called in each input; shared: in the result."""

    shared: str
    names: Sequence[str]
    t: float
    base: int | None  # which of the inputs is the base, where the method gives it a role
    scopes: Sequence[Sequence[Mapping[str, Any]]]  # of each input, from the nearest to the widest
    wide: Sequence[Mapping[str, Any]]  # of the slice, the module and the recipe
    inputs: Sequence[str] = ("input 1", "input 2", "input 3")  # what errors call them


def resolve(method: str, place: Place) -> dict[str, Any]:
    """The method's settings for a tensor. ConfigError for a required parameter that nothing tells."""
    spoken = language(method)
    told: dict[str, Any] = {}
    for name, parameter in spoken.parameters.items():
        if parameter.of == "all":
            told[name] = _found(name, parameter, place.wide, place.shared, place.t, "")
        else:
            inputs = [i for i in range(len(place.names)) if parameter.of == "input" or i != place.base]
            told[name] = tuple(
                _found(name, parameter, place.scopes[i], place.names[i], place.t, f" of {place.inputs[i]}")
                for i in inputs
            )
    return spoken.settings(told)


def _found(
    name: str, parameter: Parameter, scopes: Iterable[Mapping[str, Any]], tensor: str, t: float, whose: str
) -> Any:
    for scope in scopes:
        if name in scope:
            value = _value(scope[name], parameter, tensor, t, name)
            if value is not None:
                return value
    if parameter.default is REQUIRED:
        raise ConfigError(
            f"the recipe gives no {name}{whose} for {tensor}", fix=f"add {name}: under its parameters, or for all"
        )
    return parameter.default


def _value(setting: Any, parameter: Parameter, tensor: str, t: float, name: str) -> Any:
    """A setting's value for a tensor at t; None where no filter lets it through."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list | tuple):
        return _scalar(setting, parameter, name)
    if not setting:
        return None
    if all(not isinstance(each, Mapping) for each in setting):
        values = [_scalar(each, parameter, name) for each in setting]
        if parameter.kind is bool:
            return values[int(t * (len(values) - 1))]
        at = t * (len(values) - 1)
        low = min(int(at), len(values) - 1)
        high = min(len(values) - 1, low + 1)
        return _scalar((1 - (at - low)) * values[low] + (at - low) * values[high], parameter, name)
    for each in setting:
        if not isinstance(each, Mapping) or "value" not in each:
            raise ConfigError(f"{name} is {each!r} in the recipe", fix="write {filter: PART_OF_A_NAME, value: …}")
        part = each.get("filter")
        if part is None or part == "*" or str(part) in tensor:
            return _value(each["value"], parameter, tensor, t, name)
    return None


def _scalar(value: Any, parameter: Parameter, name: str) -> Any:
    kind = parameter.kind
    try:
        if kind is bool:
            known = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
            return known[str(value).lower()]
        number = float(value)
        if kind is int and number != int(number):
            raise ValueError
        return kind(number)
    except (ValueError, TypeError, KeyError, OverflowError):
        asked = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{name} is {value!r} in the recipe", why=f"it must be {asked}") from None
