"""The part of torch's export format that a packaged counter may use, as strict models.

torch trusts the JSON of an exported program: it evaluates shape expressions and guards as Python, and writes names into
generated code. Field names are those of torch._export.serde.schema, version 8. Whatever is not listed here is refused.
"""

# ruff: noqa: D101 - torch documents its classes
import ast
import re
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

_OPERATORS = """
_operator.add _operator.eq _operator.floordiv _operator.ge _operator.gt _operator.le _operator.lt _operator.mod
_operator.mul _operator.ne _operator.neg _operator.sub _operator.truediv math.ceil math.floor math.trunc
torch.sym_float torch.sym_int torch.sym_ite torch.sym_max torch.sym_min torch.sym_not
"""
_ATEN_OPERATORS = """
abs add add_ addcdiv addcmul addmm baddbmm bitwise_and bitwise_not bitwise_or ceil celu clamp clamp_ clamp_max
clamp_min cos div div_ elu elu_ eq erf exp expm1 floor floor_divide ge gelu glu gt hardsigmoid hardswish hardswish_
hardtanh hardtanh_ isinf isnan le leaky_relu leaky_relu_ log log1p log_sigmoid log_softmax logical_and logical_not
logical_or lt maximum minimum mish mish_ mul mul_ nan_to_num ne neg pow prelu reciprocal relu relu6 relu_ remainder
round rsqrt rsub selu sigmoid sign silu silu_ sin softmax softplus softsign sqrt square sub sub_ tanh threshold trunc
where

_upsample_nearest_exact2d adaptive_avg_pool2d adaptive_max_pool2d affine_grid_generator avg_pool2d batch_norm bmm
conv1d conv2d conv3d conv_transpose2d convolution cosine_similarity einsum grid_sampler group_norm instance_norm
layer_norm linalg_vector_norm linear matmul max_pool2d max_pool2d_with_indices mm native_group_norm native_layer_norm
rms_norm scaled_dot_product_attention upsample_bicubic2d upsample_bilinear2d upsample_nearest2d

all amax amin any argmax argmin cat channel_shuffle chunk clone col2im constant_pad_nd contiguous cumsum expand
expand_as flatten flip gather im2col index index_select masked_fill max mean min movedim narrow pad permute
pixel_shuffle pixel_unshuffle prod reflection_pad2d repeat replication_pad2d reshape roll select
slice split split_with_sizes squeeze stack std sum t tile transpose tril triu unbind unflatten unfold unsqueeze
var var_mean view

_assert_scalar _assert_tensor_metadata _to_copy alias arange detach dropout dropout_ full full_like linspace new_full
new_ones new_zeros ones ones_like promote_types result_type scalar_tensor sym_constrain_range
sym_constrain_range_for_size sym_numel sym_size sym_stride to type_as zeros zeros_like
"""
OPERATORS = frozenset(_OPERATORS.split())
"""Operators on sizes."""
ATEN_OPERATORS = frozenset(_ATEN_OPERATORS.split())
"""Operators on tensors: torch.ops.aten.NAME.OVERLOAD. Some others crash torch for certain arguments."""
WITHOUT_TENSORS = frozenset("arange full linspace ones promote_types scalar_tensor zeros".split())  # noqa: SIM905
"""Those that take no tensor; other overloads without one are TorchScript's, for numbers and strings."""

MAX_EXPRESSION = 20_000
"""Characters of a shape expression or guard."""
MAX_INTEGER = 2**24
"""Largest integer argument, so that no product of three sides overflows."""
_TO_THE_END = 2**63 - 1
MAX_DEGREE = 64
"""Sizes of the image that one size may be a product of."""
MAX_SCALE = 64.0
"""Largest factor of a resizing, and the inverse of the smallest."""

_SIZE_WORDS = frozenset(
    "Add CeilDiv CeilToInt CleanDiv FloatTrueDiv FloorDiv FloorToInt Identity IntTrueDiv Integer Max Min Mod"  # noqa: SIM905
    " ModularIndexing Mul Pow PowByNatural PythonMod Rational RoundToInt Symbol ToFloat True TruncToInt Where integer"
    " nonnegative positive".split()
)
_SYMBOL_NAME = r"[a-z]{1,4}[0-9]{1,6}"
_SYMBOL = re.compile(rf"Symbol\('{_SYMBOL_NAME}'(?:, (?:integer|nonnegative|positive)=True){{0,3}}\)")
_GUARD_NODES = (
    ast.BoolOp, ast.And, ast.Or, ast.Not, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
    ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.UnaryOp, ast.USub,
)  # fmt: skip
_GUARD_SIZE = re.compile(r"L\['image'\]\.size\(\)\[[0-3]\]")


def check_size(text: str) -> str:
    """Return a shape expression as sympy's `srepr` prints it, if it contains only arithmetic of integers and symbols.

    Raises:
        ValueError: It contains anything else.
    """
    words = re.findall(r"[A-Za-z_]\w*", text, re.ASCII)
    known = all(word in _SIZE_WORDS or re.fullmatch(_SYMBOL_NAME, word) for word in words)
    if not known or len(text) > MAX_EXPRESSION or not re.fullmatch(r"[\w(),'= -]+", text, re.ASCII):
        raise ValueError(f"{text[:80]!r} in a shape is not allowed")
    return text


def _without_derived_size(size: Any) -> Any:
    """Replace a size that is not a symbol: programs run without it, and sympy may take forever to simplify it."""
    expression = size.get("as_expr") if isinstance(size, dict) else None
    text = expression.get("expr_str") if isinstance(expression, dict) else None
    if isinstance(text, str) and not _SYMBOL.fullmatch(check_size(text)):
        return {"as_int": 2}
    return size


def _parsed(text: str) -> ast.expr:
    if len(text) > MAX_EXPRESSION or not text.isascii() or not text.isprintable():
        raise ValueError(f"a guard of {len(text)} characters is too long or not plain text")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"{text[:80]!r} is not an expression") from error


def _is_integer(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value < 2**63


def check_guard(text: str) -> str:
    """Return a guard, if it only compares integers and sizes of the image.

    Raises:
        ValueError: It contains anything else.
    """
    # The one attribute access in the grammar becomes an integer, so that no other is left to allow.
    pending: list[ast.expr] = [_parsed(_GUARD_SIZE.sub("0", text))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Call):
            valid = isinstance(node.func, ast.Name) and node.func.id in ("max", "min") and not node.keywords
            valid &= len(node.args) > 1
            pending += node.args
        elif isinstance(node, ast.Constant):
            valid = _is_integer(node) or isinstance(node.value, bool)
        else:
            valid = isinstance(node, _GUARD_NODES)
            pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
            valid &= all(isinstance(child, (ast.expr, *_GUARD_NODES)) for child in ast.iter_child_nodes(node))
        if not valid:
            raise ValueError(f"{text[:80]!r} in a guard is not allowed")
    return text


def _aten_schema(target: str) -> torch.FunctionSchema | None:
    """Return the schema of an allowed operator on tensors; None for one on sizes. Raises ValueError for others."""
    if target in OPERATORS:
        return None
    match = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.([A-Za-z]\w*)", target, re.ASCII)
    if match and match[1] in ATEN_OPERATORS and "mode" not in match[2]:
        overload = getattr(getattr(torch.ops.aten, match[1]), match[2], None)
        schema: torch.FunctionSchema | None = getattr(overload, "_schema", None)
        arguments = schema.arguments if schema else []
        takes_tensor = any("Tensor" in str(argument.type) for argument in arguments)
        writes = any(argument.is_out for argument in arguments)
        if schema and not writes and (takes_tensor or match[1] in WITHOUT_TENSORS):
            return schema
    raise ValueError(f"the operator {target[:80]} is not allowed in a package")


def _check_integer(value: int) -> int:
    if abs(value) > MAX_INTEGER and value != _TO_THE_END:
        raise ValueError(f"the integer {str(value)[:30]} is beyond the limit of {MAX_INTEGER}")
    return value


Integer = Annotated[int, AfterValidator(_check_integer)]
Bound = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,199}$")]
Path = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*$", max_length=500)]
Text = Annotated[str, StringConstraints(pattern=r"^[ -~]*$", max_length=1000)]
ScalarType = Annotated[int, Field(ge=1, le=13)]


_UNSET: Any = None
"""Default of the alternatives of a union, of which one is set."""


class Part(BaseModel):
    """A JSON object with exactly these fields and types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Union(Part):
    """One of torch's unions: an object with one field, which names the kind of its value."""

    @model_validator(mode="after")
    def _has_one_field(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError(f"one field expected, not {len(self.model_fields_set)}")
        return self


class Device(Part):
    type: Literal["cpu"]
    index: None = None


class Hint(Union):
    as_int: Bound = _UNSET


class SizeExpression(Part):
    expr_str: str
    hint: Hint | None = None


class SizeOrSymbol(Union):
    as_expr: SizeExpression = _UNSET
    as_int: Bound = _UNSET


Size = Annotated[SizeOrSymbol, BeforeValidator(_without_derived_size)]


class Constant(Union):
    as_int: Annotated[int, Field(ge=0, lt=2**40)]


class TensorMeta(Part):
    dtype: ScalarType
    sizes: Annotated[list[Size], Field(max_length=16)]
    requires_grad: bool
    device: Device
    strides: Annotated[list[Size], Field(max_length=16)]
    storage_offset: Size
    layout: Literal[7]


class TensorName(Part):
    name: Name


class OptionalTensor(Union):
    as_tensor: TensorName = _UNSET
    as_none: bool = _UNSET


class IntegerArgument(Union):
    as_name: Name = _UNSET
    as_int: Integer = _UNSET


class FloatArgument(Union):
    as_name: Name = _UNSET
    as_float: float = _UNSET


class BoolArgument(Union):
    as_name: Name = _UNSET
    as_bool: bool = _UNSET


class Argument(Union):
    as_none: bool = _UNSET
    as_tensor: TensorName = _UNSET
    as_tensors: list[TensorName] = _UNSET
    as_optional_tensor: OptionalTensor = _UNSET
    as_optional_tensors: list[OptionalTensor] = _UNSET
    as_int: Integer = _UNSET
    as_ints: list[Integer] = _UNSET
    as_float: float = _UNSET
    as_floats: list[float] = _UNSET
    as_bool: bool = _UNSET
    as_bools: list[bool] = _UNSET
    as_string: Text = _UNSET
    as_sym_int: IntegerArgument = _UNSET
    as_sym_ints: list[IntegerArgument] = _UNSET
    as_sym_float: FloatArgument = _UNSET
    as_sym_bool: BoolArgument = _UNSET
    as_scalar_type: ScalarType = _UNSET
    as_memory_format: Annotated[int, Field(ge=0, le=4)] = _UNSET
    as_layout: Literal[7] = _UNSET
    as_device: Device = _UNSET


_KINDS = {
    "memory_format": {"as_memory_format", "as_none"},
    "layout": {"as_layout", "as_none"},
    "dtype": {"as_scalar_type", "as_none"},
    "type1": {"as_scalar_type"},
    "type2": {"as_scalar_type"},
    "enable_gqa": set[str](),
}
"""Kinds of the arguments that torch also takes as other numbers, without a check."""
_SCALAR_KINDS = {"as_sym_int", "as_int", "as_sym_float", "as_float", "as_sym_bool", "as_bool"}


class NamedArgument(Part):
    name: Name
    arg: Argument
    kind: Literal[1, 2]

    @model_validator(mode="after")
    def _is_of_its_kind(self) -> Self:
        if not self.arg.model_fields_set <= _KINDS.get(self.name, self.arg.model_fields_set):
            raise ValueError(f"the argument {self.name} is not allowed like this")
        if self.name.startswith("scale"):
            factors = [factor for factor in (self.arg.as_float, *(self.arg.as_floats or ())) if factor is not None]
            if not all(1 / MAX_SCALE <= factor <= MAX_SCALE for factor in factors):
                raise ValueError(f"{self.name} is beyond a factor of {MAX_SCALE:g}")
        return self


class GraphNode(Part):
    target: str
    inputs: Annotated[list[NamedArgument], Field(max_length=64)]
    outputs: Annotated[list[Argument], Field(max_length=64)]
    metadata: dict[str, str]
    is_hop_single_tensor_return: None = None
    name: Name | None = None

    @model_validator(mode="after")
    def _calls_an_allowed_operator(self) -> Self:
        schema = _aten_schema(self.target)
        if schema is None:
            if not all(argument.arg.model_fields_set <= _SCALAR_KINDS for argument in self.inputs):
                raise ValueError(f"{self.target} takes numbers only")
            return self
        # torch passes positional arguments whatever their names, on which the checks of arguments rely.
        names = [argument.name for argument in schema.arguments]
        given = [argument.name for argument in sorted(self.inputs, key=lambda argument: argument.kind)]
        positional = sum(argument.kind == 1 for argument in self.inputs)
        keywords = given[positional:]
        if given[:positional] != names[:positional] or not set(keywords) <= set(names[positional:]):
            raise ValueError(f"{self.target} has no arguments {given}")
        return self

    @property
    def names(self) -> list[str]:
        """Names under which other nodes use its size."""
        outputs = [output.as_sym_int.as_name for output in self.outputs if output.as_sym_int]
        return [name for name in (self.name, *outputs) if name]


class SymFloat(Union):
    as_float: float = _UNSET


class SymBool(Union):
    as_bool: bool = _UNSET


class Graph(Part):
    inputs: list[Argument]
    outputs: Annotated[list[Argument], Field(min_length=1, max_length=1)]
    nodes: Annotated[list[GraphNode], Field(max_length=20_000, fail_fast=True)]
    tensor_values: dict[Name, TensorMeta]
    sym_int_values: dict[Name, Size]
    sym_bool_values: dict[Name, SymBool]
    is_single_tensor_return: bool = False
    custom_obj_values: Annotated[dict[str, None], Field(max_length=0)] = {}
    sym_float_values: dict[Name, SymFloat] = {}

    @model_validator(mode="after")
    def _has_sizes_of_limited_degree(self) -> Self:
        degrees: dict[str, int] = {}
        for node in self.nodes:
            if node.target in OPERATORS:
                used = [argument.arg.as_sym_int for argument in node.inputs]
                factors = [degrees.get(size.as_name or "", 1) for size in used if size]
                degree = sum(factors) if node.target == "_operator.mul" else max(factors, default=1)
                if degree > MAX_DEGREE:
                    raise ValueError(f"a size is a product of more than {MAX_DEGREE} sizes")
                degrees.update({name: max(degree, degrees.get(name, 1)) for name in node.names})
        return self


class UserInput(Part):
    arg: Argument


class Parameter(Part):
    arg: TensorName
    parameter_name: Path


class Buffer(Part):
    arg: TensorName
    buffer_name: Path
    persistent: bool


class TensorConstant(Part):
    arg: TensorName
    tensor_constant_name: Path


class InputSpec(Union):
    user_input: UserInput = _UNSET
    parameter: Parameter = _UNSET
    buffer: Buffer = _UNSET
    tensor_constant: TensorConstant = _UNSET


class OutputSpec(Part):
    user_output: UserInput


class Signature(Part):
    input_specs: list[InputSpec]
    output_specs: list[OutputSpec]


class CallSignature(Part):
    inputs: Annotated[list[None], Field(max_length=0)]
    outputs: Annotated[list[None], Field(max_length=0)]
    in_spec: Literal[
        '[1, {"type": "builtins.tuple", "context": "null", "children_spec": [{"type": "builtins.tuple", "context": '
        '"null", "children_spec": [{"type": null, "context": null, "children_spec": []}]}, {"type": "builtins.dict", '
        '"context": "[]", "children_spec": []}]}]'
    ]
    out_spec: Literal['[1, {"type": null, "context": null, "children_spec": []}]']
    forward_arg_names: tuple[Literal["image"]]


class ModuleCall(Part):
    fqn: Path | Literal[""]
    signature: CallSignature | None = None


class GraphModule(Part):
    graph: Graph
    signature: Signature
    module_call_graph: list[ModuleCall]
    metadata: dict[str, str] = {}
    treespec_namedtuple_fields: Annotated[dict[str, None], Field(max_length=0)] = {}


class Range(Part):
    min_val: Bound | None
    max_val: Bound | None


class SchemaVersion(Part):
    major: Literal[8]
    minor: int


class Program(Part):
    """models/model.json."""

    graph_module: GraphModule
    opset_version: dict[Literal["aten"], int]
    range_constraints: dict[Annotated[str, StringConstraints(pattern=rf"^{_SYMBOL_NAME}$")], Range]
    schema_version: SchemaVersion
    verifiers: list[Literal["TRAINING", "ATEN"]]
    torch_version: Text
    guards_code: Annotated[list[Annotated[str, AfterValidator(check_guard)]], Field(max_length=2_000, fail_fast=True)]


class StoredTensorMeta(TensorMeta):
    sizes: Annotated[list[Constant], Field(max_length=16)]  # type: ignore[assignment]
    strides: Annotated[list[Constant], Field(max_length=16)]  # type: ignore[assignment]
    storage_offset: Constant  # type: ignore[assignment]


class StoredTensor(Part):
    path_name: Annotated[str, StringConstraints(pattern=r"^(weight|tensor)_[0-9]{1,6}$")]
    is_param: bool
    use_pickle: Literal[False]
    tensor_meta: StoredTensorMeta


class StoredTensors(Part):
    """model_weights_config.json and model_constants_config.json."""

    config: dict[Path, StoredTensor]
