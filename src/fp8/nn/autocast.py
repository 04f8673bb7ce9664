"""Which recipe is active, and who is counting products.

The active recipe is one module global, the only mutable state of the library: a ContextVar does not trace under
`torch.compile`, which guards a global instead. A layer's forward reads it once and hands what it found to its backward,
which may run on another thread and after the context was left.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import RecipeError
from ..recipe import Recipe


@dataclass
class Products:
    """How often each layer's FP8 products ran: `counts[(layer name, "forward" | "grad_x" | "grad_w")]`."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def layers(self, product: str = "forward") -> set[str]:
        """The names of the layers in which this product ran."""
        return {name for name, which in self.counts if which == product}


@dataclass(frozen=True)
class Active:
    enabled: bool | None = None
    recipe: Recipe | None = None
    products: Products | None = None


_active = Active()


def active() -> Active:
    """What surrounds this call."""
    return _active


class _Surrounding:
    """Sets the global on entry, puts back what was there on exit."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes
        self.outer: list[Active] = []

    def __enter__(self) -> Any:
        global _active
        self.outer.append(_active)
        _active = replace(_active, **self.changes)
        return self.changes.get("products", self)

    def __exit__(self, *exception: object) -> None:
        global _active
        _active = self.outer.pop()


class autocast(_Surrounding):
    """Run FP8 layers in FP8 (`enabled=True`) or in high precision (`enabled=False`).

    A layer that got a recipe when it was built or converted keeps it; `recipe` (a preset's name or a `Recipe`;
    "tensorwise" by default) is for the layers that have none, which are in high precision outside of an autocast.
    Backward follows the forward that it belongs to, wherever it runs. One context at a time: it is a global, so two
    threads must not hold one each.
    """

    def __init__(self, enabled: bool = True, recipe: str | Recipe | None = None) -> None:
        if not isinstance(enabled, bool):
            raise RecipeError(
                f"autocast's first argument is enabled, True or False: write autocast(recipe={enabled!r})."
            )
        super().__init__(enabled=enabled, recipe=Recipe.of("tensorwise" if recipe is None else recipe))


class count_products(_Surrounding):
    """Count the FP8 products that run inside, by layer and role: `with count_products() as products: ...`.

    Eager mode only: a compiled graph does not come back to Python to count.
    """

    def __init__(self) -> None:
        super().__init__(products=Products())


def recipe_in_use(own: Recipe | None) -> Recipe | None:
    """The recipe that a layer runs with now; None: high precision."""
    if _active.enabled is False:
        return None
    return own if own is not None else (_active.recipe if _active.enabled else None)
