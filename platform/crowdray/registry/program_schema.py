"""The part of torch's export format that a packaged counter may use, as strict models.

torch trusts the JSON of an exported program: it evaluates shape expressions and guards as Python, and writes names into
generated code. Field names are those of torch._export.serde.schema, version 8. Whatever is not listed here is refused.
"""

# ruff: noqa: D101 - torch documents its classes
import ast
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

_OPERATORS = """
_operator.add _operator.eq _operator.floordiv _operator.ge _operator.gt _operator.le _operator.lt _operator.mod
_operator.mul _operator.ne _operator.neg _operator.pow _operator.sub _operator.truediv math.ceil math.floor math.trunc
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
pixel_shuffle pixel_unshuffle prod reflection_pad2d repeat repeat_interleave replication_pad2d reshape roll select
slice split split_with_sizes squeeze stack std sum t tile topk transpose tril triu unbind unflatten unfold unsqueeze
var var_mean view

_assert_scalar _assert_tensor_metadata _to_copy alias arange detach dropout dropout_ full full_like linspace new_full
new_ones new_zeros ones ones_like promote_types result_type scalar_tensor sym_constrain_range
sym_constrain_range_for_size sym_numel sym_size sym_stride to type_as zeros zeros_like
"""
OPERATORS = frozenset(_OPERATORS.split())
"""Operators on sizes."""
ATEN_OPERATORS = frozenset(_ATEN_OPERATORS.split())
"""Operators on tensors, in any overload but those that write into an `out` argument: torch.ops.aten.NAME.OVERLOAD."""

MAX_EXPRESSION = 20_000
"""Characters of a shape expression or guard."""

_SIZE_FUNCTIONS = frozenset(["Add", "CeilDiv", "FloorDiv", "Integer", "Max", "Min", "Mod", "Mul", "PythonMod"])
_SYMBOL_ASSUMPTIONS = frozenset(["integer", "nonnegative", "positive"])
_SYMBOL = re.compile(r"[a-z]{1,4}[0-9]{1,6}")
_GUARD_NODES = (
    ast.BoolOp, ast.And, ast.Or, ast.Not, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
    ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.UnaryOp, ast.USub,
)  # fmt: skip
_GUARD_SIZE = re.compile(r"L\['image'\]\.size\(\)\[[0-3]\]")


def _parsed(text: str) -> ast.expr:
    if len(text) > MAX_EXPRESSION or not text.isascii() or not text.isprintable():
        raise ValueError(f"an expression of {len(text)} characters is too long or not plain text")
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"{text[:80]!r} is not an expression") from error


def _is_integer(node: ast.expr) -> bool:
    negated = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    constant = node.operand if isinstance(node, ast.UnaryOp) and negated else node
    return isinstance(constant, ast.Constant) and type(constant.value) is int and constant.value < 2**63


def check_size(text: str) -> str:
    """Return a shape expression as sympy's `srepr` prints it, if it contains only integers, symbols and arithmetic.

    Raises:
        ValueError: It contains anything else.
    """
    pending = [_parsed(text)]
    while pending:
        node = pending.pop()
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError(f"{ast.unparse(node)[:80]!r} in a shape is not allowed")
        name, arguments = node.func.id, node.args
        if name == "Symbol":
            symbol = arguments[0].value if len(arguments) == 1 and isinstance(arguments[0], ast.Constant) else None
            valid = isinstance(symbol, str) and bool(_SYMBOL.fullmatch(symbol))
            valid &= all(
                keyword.arg in _SYMBOL_ASSUMPTIONS and isinstance(keyword.value, ast.Constant)
                for keyword in node.keywords
            )
        elif name == "Integer":
            valid = len(arguments) == 1 and _is_integer(arguments[0]) and not node.keywords
        else:
            valid = name in _SIZE_FUNCTIONS and not node.keywords
            pending += arguments
        if not valid:
            raise ValueError(f"{ast.unparse(node)[:80]!r} in a shape is not allowed")
    return text


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
            pending += node.args
        elif isinstance(node, ast.Constant):
            valid = _is_integer(node) or isinstance(node.value, bool)
        else:
            valid = isinstance(node, _GUARD_NODES)
            pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
            valid &= all(isinstance(child, (ast.expr, *_GUARD_NODES)) for child in ast.iter_child_nodes(node))
        if not valid:
            raise ValueError(f"{ast.unparse(node)[:80]!r} in a guard is not allowed")
    return text


def _check_operator(target: str) -> str:
    aten = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.([A-Za-z]\w*)", target, re.ASCII)
    allowed = aten[1] in ATEN_OPERATORS and not f"_{aten[2]}".endswith("_out") if aten else target in OPERATORS
    if not allowed:
        raise ValueError(f"the operator {target[:80]} is not allowed in a package")
    return target


Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
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
    as_int: Integer = _UNSET


class SizeExpression(Part):
    expr_str: Annotated[str, AfterValidator(check_size)]
    hint: Hint | None = None


class Size(Union):
    as_expr: SizeExpression = _UNSET
    as_int: Integer = _UNSET


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


class NamedArgument(Part):
    name: Name
    arg: Argument
    kind: Literal[0, 1, 2] | None = None


class GraphNode(Part):
    target: Annotated[str, AfterValidator(_check_operator)]
    inputs: list[NamedArgument]
    outputs: list[Argument]
    metadata: dict[str, str]
    is_hop_single_tensor_return: None = None
    name: Name | None = None


class SymFloat(Union):
    as_float: float = _UNSET


class SymBool(Union):
    as_bool: bool = _UNSET


class Graph(Part):
    inputs: list[Argument]
    outputs: Annotated[list[Argument], Field(min_length=1, max_length=1)]
    nodes: Annotated[list[GraphNode], Field(max_length=20_000)]
    tensor_values: dict[Name, TensorMeta]
    sym_int_values: dict[Name, Size]
    sym_bool_values: dict[Name, SymBool]
    is_single_tensor_return: bool = False
    custom_obj_values: Annotated[dict[str, None], Field(max_length=0)] = {}
    sym_float_values: dict[Name, SymFloat] = {}


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
    min_val: Integer | None
    max_val: Integer | None


class SchemaVersion(Part):
    major: Literal[8]
    minor: int


class Program(Part):
    """models/model.json."""

    graph_module: GraphModule
    opset_version: dict[Literal["aten"], int]
    range_constraints: dict[Annotated[str, StringConstraints(pattern=r"^[a-z]{1,4}[0-9]{1,6}$")], Range]
    schema_version: SchemaVersion
    verifiers: list[Literal["TRAINING", "ATEN"]]
    torch_version: Text
    guards_code: list[Annotated[str, AfterValidator(check_guard)]]


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
