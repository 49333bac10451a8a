"""Writing down what a model's pass does to differences: a tensor that goes through unmodified modeling code.

The last token runs once, as a great many equal rows of which one is computed: a `Traced` tensor says that it has all of
them, and holds one. Of several prompts, which may be traced together, each has its share of the rows, and one of them
is held. Whatever torch function it meets is looked up by name (`difference_rules.py`), is run on the one
row, and leaves a step in a `Program`. What has no rule is refused; so is whatever mixes rows or depends on their values
(a choice of experts), because it is a function without a rule, or gives something without an axis of rows. The number
of rows is a prime that divides no size of the model, so that shapes tell what is rows.

Casts are nominal: code is told the dtype that it asked for, and nothing is rounded. The row is in float64, because its
errors are the same in all rows and do not average out; of it steps keep what they need in the precision of differences.

Axes: B prompts, R rows, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from neg_service.models.engines.base import MismatchError
from neg_service.models.engines.difference_products import Product
from neg_service.models.engines.difference_program import Batch, Program, Run, SiteStep, Step
from neg_service.models.feed_forward import Point, Site
from neg_service.models.precision import float32_as_asked
from neg_service.models.transfer import indices

# What the rows are so many of, while a pass is traced.
_PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061)
# Properties of a tensor that do not depend on its values.
_PROPERTIES = frozenset((
    "shape", "dtype", "device", "ndim", "layout", "names", "requires_grad", "is_leaf", "grad_fn", "is_cpu", "is_cuda",
    "is_meta", "is_mps", "is_nested", "is_quantized", "is_sparse", "is_xpu",
))  # fmt: skip

Rule = Callable[["Trace", Any, tuple[Any, ...], dict[str, Any]], Any]


def primes_for(sizes: Iterable[int]) -> int:
    """How many rows to trace with: a prime that divides none of a model's sizes.

    Raises:
        MismatchError: each divides one.
    """
    known = set(sizes)
    for prime in _PRIMES:
        if all(size % prime for size in known):
            return prime
    raise MismatchError(f"its sizes are multiples of {', '.join(map(str, _PRIMES))}, which stand for rows")


class Traced(Tensor):
    """`rows` equal rows, of which `row` is one, or one of each prompt; differences from it are in a slot of the
    program, None: there are none.

    Its own dtype is what the code that runs believes.
    """

    tracer: Trace
    row: Tensor
    slot: int | None

    @staticmethod
    def __new__(cls, tracer: Trace, row: Tensor, slot: int | None, shape: Any, dtype: torch.dtype) -> Traced:
        """A tensor without storage of its own."""
        self: Traced = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=row.device)
        self.tracer, self.row, self.slot = tracer, row, slot
        if slot is not None:
            tracer.program.axes[slot] = tracer.axis(shape)
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Traced({tuple(self.shape)}, slot={self.slot})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What gets here went round the rules."""
        raise no_rule(str(func))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function by its rule."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", str(func))
        with DisableTorchFunctionSubclass(), float32_as_asked():
            if name == "__get__":
                asked = getattr(getattr(func, "__self__", None), "__name__", "?")
                if asked in _PROPERTIES:
                    return func(*args)
                name = f".{asked}"
            trace = first_traced((*args, *kwargs.values())).tracer
            rule = trace.rules.get(name)
            if rule is None:
                raise no_rule(name)
            return rule(trace, func, args, kwargs)


def first_traced(values: Iterable[Any]) -> Traced:
    """The first one among some values, or in a list of theirs."""
    for value in values:
        if isinstance(value, Traced):
            return value
        if isinstance(value, list | tuple):
            for own in value:
                if isinstance(own, Traced):
                    return own
    raise no_rule("a function without differences")


class Trace:
    """A program that is being written.

    rows: how many there are while it is, of all prompts. product: what multiplies differences with weights;
    weights_dtype: what these are kept in, whatever the pass runs in. dtype: the precision of differences. prompts: how
    many are traced together.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        rows: int,
        product: Product,
        weights_dtype: torch.dtype,
        dtype: torch.dtype,
        prompts: int = 1,
    ) -> None:
        self.rules, self.rows, self.product = rules, rows, product
        self.weights_dtype, self.dtype, self.prompts = weights_dtype, dtype, prompts
        # Whose each row is, and the first row of each.
        self.prompt_of = [r * prompts // rows for r in range(rows)]
        self._first = [self.prompt_of.index(b) for b in range(prompts)]
        self.program = Program(dtype)
        # Tables of angles meet each layer.
        self._narrowed: dict[Any, tuple[Tensor, Tensor]] = {}

    def step(self, run: Run, *given: Traced | None) -> int | None:
        """Write a step down; its slot, None where nothing that it is given has differences."""
        slots = tuple(-1 if own is None or own.slot is None else own.slot for own in given)
        if all(slot < 0 for slot in slots):
            return None
        known = tuple(slot for slot in slots if slot >= 0)
        if len(known) < len(slots):
            run = _among(run, tuple(slot >= 0 for slot in slots))
        out = self.program.slot()
        self.program.steps.append(Step(run, known, out))
        return out

    def step_of(self, what: str, make: Callable[..., Any], rows: Sequence[Tensor], *given: Traced | None) -> int | None:
        """Write down a step that depends on rows without a shift: `make` gives a function of differences, of such rows.

        Raises:
            MismatchError: `make` gives None, or rows share an axis with something else and are of several prompts.
        """
        if self.prompts == 1:
            made = make(*rows)
            if made is None:
                raise no_rule(what)
            return self.step(lambda _batch, *d: made(*d), *given)
        traced = [own for own in given if own is not None]
        if all(own.slot is None for own in traced):
            return None
        axes = {None if (axis := self.axis(own.shape)) is None else axis - own.ndim for own in traced}
        axis = axes.pop()
        if axes or axis is None:
            raise MismatchError(f"{what}: rows share an axis with something else, which is not run for several prompts")
        return self.step(_OfPrompts(what, make, rows, axis, self.prompts), *given)

    def finish(self, output: int | None) -> Program:
        """The program."""
        self.program.finish(output)
        return self.program

    def let_go(self) -> None:
        """Know no longer of the program, whose steps know the trace: together they would be garbage for long."""
        del self.program
        self._narrowed.clear()

    def axis(self, shape: Sequence[int]) -> int | None:
        """Which axis is the rows; None where these share one with something else."""
        return next((i for i, size in enumerate(shape) if size == self.rows), None)

    def has_rows(self, x: Any) -> bool:
        """Whether an operand, traced or not, has an axis of rows."""
        return isinstance(x, Tensor) and any(size and size % self.rows == 0 for size in x.shape)

    def made(self, row: Tensor, slot: int | None, shape: Any, dtype: torch.dtype) -> Traced:
        """A tensor of a shape, which has to be that of its row, or rows, with one axis of all rows.

        Raises:
            MismatchError: it is not.
        """
        axes = [i for i, size in enumerate(shape) if size and size % self.rows == 0]
        if len(axes) != 1 or tuple(row.shape) != self.sized(tuple(shape), self.prompts):
            raise MismatchError(f"rows are mixed: a row of shape {tuple(row.shape)} became {tuple(shape)}")
        return Traced(self, row, slot, shape, dtype)

    def site(self, site: Site, point: Point, x: Tensor) -> Traced:
        """Where neurons pass by: what goes on has the differences that a run adds there."""
        own = self.wrapped(x)
        (axis,) = (i for i, size in enumerate(own.shape) if size % self.rows == 0)
        if own.row.numel() != self.prompts * own.row.shape[-1]:
            raise MismatchError(f"the neurons of layer {site.layer} stand on several axes of a token")
        out = self.program.slot()
        row = own.row.reshape(self.prompts, -1)
        self.program.steps.append(SiteStep(site, point, own.slot, out, tuple(own.row.shape), axis, row))
        return Traced(self, own.row, out, own.shape, own.dtype)

    def wrapped(self, x: Tensor) -> Traced:
        """A plain tensor of equal rows as a traced one."""
        if isinstance(x, Traced):
            return x
        return self.made(self.narrowed(x), None, x.shape, x.dtype)

    def narrowed(self, x: Tensor) -> Tensor:
        """One row of a plain tensor, or one of each prompt, or the tensor itself where it has no axis of rows.

        Raises:
            MismatchError: rows that are not equal.
        """
        if not self.has_rows(x):
            return x
        key = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype)
        if key not in self._narrowed:
            axis = self.axis(x.shape)
            if axis is None:
                raise MismatchError("rows share an axis with something else before any shift")
            if self.prompts == 1:
                found = all_rows = x.narrow(axis, 0, 1)
            else:
                found = x.index_select(axis, indices(self._first, x.device))
                all_rows = found.index_select(axis, indices(self.prompt_of, x.device))
            # NaN equals nothing; who reads the logits tells of it.
            if not ((all_rows == x) | x.isnan()).all():
                raise MismatchError("rows of one token are not equal before any shift")
            # The tensor is kept, so that nothing else gets its place in memory.
            self._narrowed[key] = (found, x)
        return self._narrowed[key][0]

    def constant(self, x: Any, like: Tensor) -> Any:
        """What is no traced tensor, as an operand beside a row: one row of it, in the row's precision."""
        if not isinstance(x, Tensor):
            return x
        # Detached: another precision of a parameter lasts no longer than the pass (`precision.py`).
        x = self.narrowed(x.detach())
        return x.to(like.dtype) if x.is_floating_point() and x.ndim else x

    def kept(self, x: Any) -> Any:
        """What a step keeps of the row, or a number, in the precision of differences."""
        return x.to(self.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def sized(self, value: Any, n_rows: int) -> Any:
        """Shapes and the like with another number of rows."""
        if type(value) is int:
            return value // self.rows * n_rows if value and value % self.rows == 0 else value
        if isinstance(value, tuple | list):
            return tuple(self.sized(own, n_rows) for own in value)
        return value


class _OfPrompts:
    """A step that depends on rows without a shift, of which each prompt has one along an axis, counted from the end.

    Differences have it split in two, prompts and rows of each, and what is made of rows one for all rows of a prompt.
    """

    def __init__(self, what: str, make: Callable[..., Any], rows: Sequence[Tensor], axis: int, n_prompts: int) -> None:
        self._make, self._axis = make, axis
        self._rows = [row.unsqueeze(row.ndim + axis + 1) if row.ndim >= -axis else row for row in rows]
        self._all = tuple(range(n_prompts))
        # Of all, and of those of the last call that was of some.
        self._made: dict[tuple[int, ...], Any] = {self._all: make(*self._rows)}
        if self._made[self._all] is None:
            raise no_rule(what)

    def __call__(self, batch: Batch, *given: Tensor | None) -> Tensor:
        axis = self._axis
        apart = [None if d is None else torch.unflatten(d, axis, (len(batch.prompts), batch.rows)) for d in given]
        found: Tensor = self._of(batch.prompts)(*apart)
        return found.flatten(axis - 1, axis)

    def _of(self, prompts: tuple[int, ...]) -> Any:
        """What was made of the rows of some prompts."""
        if prompts not in self._made:
            made = self._make(*(self._some(row, prompts) for row in self._rows))
            self._made = {self._all: self._made[self._all], prompts: made}
        return self._made[prompts]

    def _some(self, row: Tensor, prompts: tuple[int, ...]) -> Tensor:
        axis = self._axis - 1
        if row.ndim < -axis or row.shape[axis] == 1:
            return row
        return row.index_select(axis, indices(prompts, row.device))


def _among(run: Run, has: tuple[bool, ...]) -> Run:
    """A step that is given the differences of those that have some, and None for the others."""

    def filled(batch: Batch, *given: Tensor | None) -> Tensor:
        left = iter(given)
        return run(batch, *(next(left) if own else None for own in has))

    return filled


def put_in(rules: dict[str, Rule]) -> Callable[..., Callable[[Rule], Rule]]:
    """A decorator that makes a function the rule of torch functions of some names."""

    def of(*names: str) -> Callable[[Rule], Rule]:
        def put(rule: Rule) -> Rule:
            rules.update(dict.fromkeys(names, rule))
            return rule

        return put

    return of


def no_rule(what: str) -> MismatchError:
    """Why a pass cannot be traced."""
    return MismatchError(f"{what} has no rule for differences")


def promoted(*values: Any) -> torch.dtype:
    """What dtype torch gives a function of some values."""
    tensors = [own for own in values if isinstance(own, Tensor) and own.is_floating_point()]
    dtype = tensors[0].dtype
    # Of a tensor of no axes only its kind counts.
    for own in tensors[1:]:
        dtype = torch.promote_types(dtype, own.dtype) if own.ndim else dtype
    return dtype
