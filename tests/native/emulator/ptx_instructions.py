"""The translation of each family of opcodes; importing this module fills `ptx_operands.HANDLERS`."""

from __future__ import annotations

from tests.native.emulator.ptx_operands import (
    CPP_TYPES,
    Instruction,
    Untranslated,
    address,
    base_and_offset,
    label,
    opcode,
    register,
    value,
    vector,
)

WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
INTEGER_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNORDERED = {
    "ltu": ">=",
    "leu": ">",
    "gtu": "<=",
    "geu": "<",
    "equ": "!=",
    "neu": "==",
}  # the negation, ordered


@opcode("ld", "st")
def load_or_store(ins: Instruction) -> str:
    space = ins.need("param", "shared", "global")
    count = int((ins.take("v2", "v4") or "v1")[1:])
    ins.take("nc")
    ins.take("cs")
    type_ = ins.type()
    cpp = CPP_TYPES[type_]
    registers, place = (ins.operands[0], ins.operands[1]) if ins.name == "ld" else ins.operands[::-1]
    pointer = address(place, space, cpp, count, ins.kernel)
    if ins.name == "ld":
        moves = [f"set({register(r)}, p[{i}]);" for i, r in enumerate(vector(registers))]
    else:
        moves = [f"p[{i}] = {value(r, type_, ins.kernel)};" for i, r in enumerate(vector(registers))]
    return " ".join([f"auto* p = {pointer};", *moves])


@opcode("mov")
def move(ins: Instruction) -> str:
    type_ = ins.type()
    to, parts = vector(ins.operands[0]), vector(ins.operands[1])
    if len(to) == len(parts) == 1:
        return ins.set(ins.value(1, type_), type_)
    bits = int(type_[1:])
    part = f"b{bits // max(len(to), len(parts))}"
    if len(parts) > 1:
        cpp, width = CPP_TYPES[type_], int(part[1:])
        words = [f"(({cpp}){value(p, part, ins.kernel)} << {i * width})" for i, p in enumerate(parts)]
        return ins.set(" | ".join(words), type_)
    whole = value(parts[0], type_, ins.kernel)
    return " ".join(
        f"set({register(t)}, ({CPP_TYPES[part]})({whole} >> {i * int(part[1:])}));" for i, t in enumerate(to)
    )


@opcode("cvta")
def convert_address(ins: Instruction) -> str:
    to, space, type_ = ins.take("to"), ins.need("global", "shared"), ins.type()
    source = ins.value(1, type_)
    if space == "global":
        return ins.set(source, type_)
    return ins.set(f"{'shared_of_generic' if to else 'generic_of_shared'}({source})", type_)


@opcode("add", "sub", "and", "or", "xor")
def two_operands(ins: Instruction) -> str:
    ins.take("rn")
    type_ = ins.type()
    sign = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}[ins.name]
    # Integers wrap around: compute unsigned.
    operand = type_.replace("s", "u") if type_ != "pred" else type_
    return ins.set(f"{ins.value(1, operand)} {sign} {ins.value(2, operand)}", type_)


@opcode("mul", "mad")
def multiply(ins: Instruction) -> str:
    ins.take("rn")
    part, type_ = ins.take("lo", "wide"), ins.type()
    result = WIDER[type_] if part == "wide" else type_
    operand = type_ if part == "wide" or type_.startswith("f") else type_.replace("s", "u")
    product = f"({CPP_TYPES[result]}){ins.value(1, operand)} * ({CPP_TYPES[result]}){ins.value(2, operand)}"
    if part != "wide" and not type_.startswith("f"):
        product = f"({CPP_TYPES[operand]})({ins.value(1, operand)} * {ins.value(2, operand)})"
        if type_.endswith("16"):  # C++ would multiply as int
            product = f"(uint32_t){ins.value(1, operand)} * (uint32_t){ins.value(2, operand)}"
    return ins.set(product + (f" + {ins.value(3, result)}" if ins.name == "mad" else ""), result)


@opcode("fma")
def fused_multiply_add(ins: Instruction) -> str:
    rounding, type_ = ins.need("rn", "rm"), ins.need("f32")
    a, b, c = (ins.value(i, type_) for i in (1, 2, 3))
    return ins.set(f"std::fma({a}, {b}, {c})" if rounding == "rn" else f"fma_down({a}, {b}, {c})", type_)


@opcode("div", "rem")
def divide(ins: Instruction) -> str:
    ins.take("rn")
    type_ = ins.type()
    return ins.set(f"{ins.value(1, type_)} {'/' if ins.name == 'div' else '%'} {ins.value(2, type_)}", type_)


@opcode("ex2", "rcp")
def approximate(ins: Instruction) -> str:
    """Here exact to half a unit; on a GPU within 2. Only the activations use them."""
    ins.need("approx")
    ins.take("ftz")
    type_ = ins.need("f32")
    x = ins.value(1, type_)
    return ins.set(f"std::exp2({x})" if ins.name == "ex2" else f"1.0f / {x}", type_)


@opcode("min", "max")
def extreme(ins: Instruction) -> str:
    type_ = ins.type()
    a, b = ins.value(1, type_), ins.value(2, type_)
    if ins.take("NaN"):
        return ins.set(f"{'smaller' if ins.name == 'min' else 'larger'}({a}, {b})", type_)
    if type_ == "f32":
        return ins.set(f"std::f{ins.name}({a}, {b})", type_)
    return ins.set(f"{a} {'<' if ins.name == 'min' else '>'} {b} ? {a} : {b}", type_)


@opcode("abs", "neg", "not", "copysign")
def unary(ins: Instruction) -> str:
    type_ = ins.type()
    if ins.name == "copysign":  # the sign is the first operand's
        return ins.set(f"std::copysign({ins.value(2, type_)}, {ins.value(1, type_)})", type_)
    x = ins.value(1, type_)
    if ins.name == "not":
        return ins.set(f"!{x}" if type_ == "pred" else f"~{x}", type_)
    if ins.name == "abs":
        return ins.set(f"std::fabs({x})" if type_ == "f32" else f"{x} < 0 ? -{x} : {x}", type_)
    return ins.set(f"-{x}" if type_ == "f32" else f"0 - {ins.value(1, type_.replace('s', 'u'))}", type_)


@opcode("shl", "shr")
def shift(ins: Instruction) -> str:
    type_ = ins.type()
    direction = "left" if ins.name == "shl" else "right"
    return ins.set(f"shift_{direction}({ins.value(1, type_)}, {ins.value(2, 'u32')})", type_)


@opcode("bfe", "bfi", "prmt", "dp4a")
def bytes_and_fields(ins: Instruction) -> str:
    if ins.name == "dp4a":
        ins.need("s32")
        ins.need("s32")
        return ins.set(f"__dp4a({', '.join(ins.value(i, 's32') for i in (1, 2, 3))})", "s32")
    type_ = ins.type()
    if ins.name == "bfe":
        return ins.set(
            f"extract_bits({ins.value(1, type_)}, {ins.value(2, 'u32')}, {ins.value(3, 'u32')})", type_
        )
    if type_ != "b32":
        raise Untranslated(ins.text)
    function = "insert_bits" if ins.name == "bfi" else "__byte_perm"
    return ins.set(
        f"{function}({', '.join(ins.value(i, type_) for i in range(1, len(ins.operands)))})", type_
    )


@opcode("setp")
def compare(ins: Instruction) -> str:
    type_ = ins.type()
    comparison = ins.need(*INTEGER_COMPARISONS, *UNORDERED, "nan")
    a, b = ins.value(1, type_), ins.value(2, type_)
    if comparison == "nan":
        return ins.set(f"{a} != {a} || {b} != {b}", "pred")
    if comparison in UNORDERED:
        ordered = f"({a} < {b} || {a} > {b})" if comparison == "equ" else f"({a} {UNORDERED[comparison]} {b})"
        return ins.set(f"!{ordered}", "pred")
    if comparison == "ne" and type_.startswith("f"):  # false where either is NaN, unlike C++
        return ins.set(f"{a} < {b} || {a} > {b}", "pred")
    return ins.set(f"{a} {INTEGER_COMPARISONS[comparison]} {b}", "pred")


@opcode("selp")
def select(ins: Instruction) -> str:
    type_ = ins.type()
    return ins.set(f"{ins.value(3, 'pred')} ? {ins.value(1, type_)} : {ins.value(2, type_)}", type_)


@opcode("cvt")
def convert(ins: Instruction) -> str:
    if pair := ins.take("bf16x2", "f16x2"):  # the first source is the high half
        ins.need("rn")
        ins.need("f32")
        low, high = ins.value(2, "f32"), ins.value(1, "f32")
        return ins.set(
            f"pair_of({low}, {high}, {'__nv_bfloat16' if pair == 'bf16x2' else '__half'}())", "b32"
        )
    source, to = ins.type(), ins.type()
    if "f16" in (source, to) or "bf16" in (source, to):
        return convert_half(ins, source, to)
    x = ins.value(1, source)
    rounding = ins.take("rni", "rzi", "rmi", "rpi", "rn")
    if source == "f32" and rounding in ("rni", "rzi", "rmi", "rpi"):
        function = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}[rounding]
        whole = f"std::{function}({x})"
        return ins.set(whole if to == "f32" else f"to_integer<{CPP_TYPES[to]}>({whole})", to)
    if ins.take("sat"):
        if (source, to) != ("f32", "f32"):
            raise Untranslated(ins.text)
        return ins.set(f"{x} >= 1.0f ? 1.0f : {x} > 0.0f ? {x} : 0.0f", to)  # NaN gives 0
    return ins.set(x, to)


def convert_half(ins: Instruction, source: str, to: str) -> str:
    if to == "f32":
        if source != "f16":
            raise Untranslated(ins.text)
        return ins.set(f"__half2float({{{ins.value(1, 'b16')}}})", to)
    ins.need("rn")
    if source != "f32":
        raise Untranslated(ins.text)
    function = {"f16": "__float2half_rn", "bf16": "__float2bfloat16_rn"}[to]
    return ins.set(f"{function}({ins.value(1, 'f32')}).bits", "b16")


@opcode("bra")
def branch(ins: Instruction) -> str:
    ins.take("uni")
    return f"goto {label(ins.operands[0])};"


@opcode("ret")
def leave(ins: Instruction) -> str:
    return "return;"


@opcode("bar")
def barrier(ins: Instruction) -> str:
    if ins.take("warp"):
        ins.need("sync")
        return f"__syncwarp({ins.value(0, 'u32')});"
    ins.need("sync")
    if ins.operands != ["0"]:
        raise Untranslated(ins.text)
    return "__syncthreads();"


@opcode("shfl")
def shuffle(ins: Instruction) -> str:
    for modifier in ("sync", "bfly", "b32"):
        ins.need(modifier)
    to, _, valid = ins.operands[0].partition("|")
    arguments = ", ".join(ins.value(i, "b32") for i in (4, 1, 2, 3))
    tell = f" set({register(valid)}, valid);" if valid else ""
    return f"bool valid; set({register(to)}, shuffle_butterfly({arguments}, valid));{tell}"


@opcode("redux")
def reduce(ins: Instruction) -> str:
    ins.need("sync")
    operation, type_ = ins.need("add", "max"), ins.need("u32", "s32")
    if operation == "max" and type_ == "s32":
        raise Untranslated(ins.text)
    return ins.set(f"__reduce_{operation}_sync({ins.value(2, 'b32')}, {ins.value(1, type_)})", type_)


@opcode("atom")
def atomic(ins: Instruction) -> str:
    space, operation = ins.need("global", "shared"), ins.need("add", "min", "max")
    type_ = ins.need("u32", "u64", "s32")
    pointer = address(ins.operands[1], space, CPP_TYPES[type_], 1, ins.kernel)
    return ins.set(f"atomic{operation.capitalize()}({pointer}, {ins.value(2, type_)})", type_)


@opcode("ldmatrix")
def load_matrix(ins: Instruction) -> str:
    for modifier in ("sync", "aligned", "m8n8", "x4", "shared", "b16"):
        ins.need(modifier)
    pointer = address(ins.operands[1], "shared", "uint32_t", 4, ins.kernel)
    moves = " ".join(f"set({register(r)}, rows[{i}]);" for i, r in enumerate(vector(ins.operands[0])))
    return f"uint32_t rows[4]; ldmatrix_x4(rows, {pointer}); {moves}"


@opcode("mma")
def multiply_matrices(ins: Instruction) -> str:
    """`satfinite` clamps sums at the ends of int32, which no test comes near."""
    for modifier in ("sync", "aligned", "m16n8k32", "row", "col", "s32", "s8", "s8", "s32"):
        ins.need(modifier)
    ins.take("satfinite")
    results, a, b, sums = (vector(operand) for operand in ins.operands)

    def words(names: list[str], type_: str) -> str:
        return ", ".join(value(name, type_, ins.kernel) for name in names)

    moves = " ".join(f"set({register(r)}, sums[{i}]);" for i, r in enumerate(results))
    return (
        f"int sums[4] = {{{words(sums, 's32')}}}; const uint32_t a[4] = {{{words(a, 'b32')}}}; "
        f"const uint32_t b[2] = {{{words(b, 'b32')}}}; mma_s8_16x8x32(sums, a, b[0], b[1]); {moves}"
    )


@opcode("cp")
def copy_async(ins: Instruction) -> str:
    ins.need("async")
    if ins.take("commit_group"):
        return "commit_copies();"
    if ins.take("wait_group"):
        return f"wait_copies<{int(ins.operands[0], 0)}>();"
    for modifier in ("cg", "shared", "global"):
        ins.need(modifier)
    if ins.operands[2] not in ("16", "0x10"):
        raise Untranslated(ins.text)
    to, to_offset = base_and_offset(ins.operands[0])
    source, offset = base_and_offset(ins.operands[1])
    count = ins.value(3, "u32") if len(ins.operands) > 3 else "16u"
    return (
        f"ptx::copy_async_16({value(to, 'u32', ins.kernel)} + {to_offset}, "
        f"{value(source, 'u64', ins.kernel)} + {offset}, {count});"
    )
