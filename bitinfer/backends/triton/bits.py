"""What the kernels share on bits: signs out of words, popcounts, and products that nothing may fuse.

Layout (:mod:`bitinfer.packing`): column ``32*w + j`` is bit ``j`` of word ``w``, and a set bit means -1.
``TARGET`` is ``"cuda"``, ``"hip"``, or ``""`` in Triton's interpreter, which knows no assembly.
"""

import triton
import triton.language as tl


@triton.jit
def flip(z, units, j: tl.constexpr):
    """Return ``z`` with its sign flipped where bit ``j`` of ``units`` is set; float32 and uint32 in."""
    sign = (units << (31 - j)) & 0x80000000
    return (z.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def shifts_of(words_ptr, never):
    """Return 0 to 31 for :func:`expand_signs` and :func:`expand_bits`; ``never`` is false at run time.

    The masked load reads nothing. Triton lets a matrix operand be made in the registers that the matrix unit reads only
    where all that it is made of was loaded; else every expanded sign goes through shared memory.
    """
    j = tl.arange(0, 32)
    return tl.load(words_ptr + j, mask=(j >= 0) & never, other=j.to(words_ptr.dtype.element_ty))


@triton.jit
def expand_signs(words, shifts, DTYPE: tl.constexpr):
    """Return the signs of uint32 ``words [R, W]`` as +1 and -1 of ``DTYPE`` (float16 or bfloat16): ``[R, 32*W]``."""
    # the sign lands on bit 31 and the rest of a one below it, so that one logic instruction makes both
    one: tl.constexpr = 0x3C000000 if DTYPE == tl.float16 else 0x3F800000
    high = ((words[:, :, None] << (31 - shifts)[None, None, :]) & 0x80000000) | one
    signs = (high >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    return tl.reshape(signs, (words.shape[0], words.shape[1] * 32))


@triton.jit
def expand_scaled(words, shifts, scale):
    """Return 16-bit floats ``scale [32*W]`` with the signs of uint32 ``words [R, W]``: ``[R, 32*W]``."""
    magnitude = tl.reshape(scale.to(tl.uint16, bitcast=True).to(tl.uint32) << 16, (words.shape[1], 32))
    high = ((words[:, :, None] << (31 - shifts)[None, None, :]) & 0x80000000) ^ magnitude[None, :, :]
    signs = (high >> 16).to(tl.uint16).to(scale.dtype, bitcast=True)
    return tl.reshape(signs, (words.shape[0], words.shape[1] * 32))


@triton.jit
def expand_bits(words, shifts):
    """Return the bits of uint32 ``words [R, W]`` as int8 zeros and ones: ``[R, 32*W]``."""
    bits = (words[:, :, None] >> shifts[None, None, :]) & 1
    return tl.reshape(bits.to(tl.int8), (words.shape[0], words.shape[1] * 32))


@triton.jit
def popcount(words, TARGET: tl.constexpr):
    """Return how many bits of each uint32 are set, as int32."""
    if TARGET == "cuda":
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1)
    elif TARGET == "hip":
        return tl.inline_asm_elementwise(
            "v_bcnt_u32_b32 $0, $1, 0", "=v,v", [words], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        pairs = words - ((words >> 1) & 0x55555555)
        fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        return ((((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def worth(counts, b: tl.constexpr, BITS: tl.constexpr):
    """Return what ``counts`` of bit ``b`` are worth in a two's complement of ``BITS`` bits."""
    value: tl.constexpr = -(1 << b) if b == BITS - 1 else 1 << b
    return counts * value


@triton.jit
def product(a, b, TARGET: tl.constexpr):
    """Return ``a * b`` rounded to float32 by itself: never fused with an addition that follows."""
    a, b = tl.broadcast(a, b)
    if TARGET == "cuda":
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    elif TARGET == "hip":
        return tl.inline_asm_elementwise(
            "v_mul_f32 $0, $1, $2", "=v,v,v", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return a * b


@triton.jit
def load_floats(ptr, offsets, mask):
    """Load in float32, zero where ``mask`` is off."""
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_four(ptr, columns, K, mask, WIDE: tl.constexpr):
    """Load four neighbouring columns, each a tensor of its own, in float32; zero past K.

    ``WIDE``: addresses are multiples of eight bytes and ``mask`` is enough to stay below K.
    """
    if WIDE:
        if ptr.dtype.element_ty.primitive_bitwidth == 16:
            quad = tl.load((ptr + columns).to(tl.pointer_type(tl.uint64)), mask=mask, other=0)
            a = (quad & 0xFFFF).to(tl.uint16)
            b = ((quad >> 16) & 0xFFFF).to(tl.uint16)
            c = ((quad >> 32) & 0xFFFF).to(tl.uint16)
            d = (quad >> 48).to(tl.uint16)
        else:
            low = tl.load((ptr + columns).to(tl.pointer_type(tl.uint64)), mask=mask, other=0)
            high = tl.load((ptr + columns + 2).to(tl.pointer_type(tl.uint64)), mask=mask, other=0)
            a = (low & 0xFFFFFFFF).to(tl.uint32)
            b = (low >> 32).to(tl.uint32)
            c = (high & 0xFFFFFFFF).to(tl.uint32)
            d = (high >> 32).to(tl.uint32)
        kind: tl.constexpr = ptr.dtype.element_ty
        a = a.to(kind, bitcast=True).to(tl.float32)
        b = b.to(kind, bitcast=True).to(tl.float32)
        c = c.to(kind, bitcast=True).to(tl.float32)
        d = d.to(kind, bitcast=True).to(tl.float32)
    else:
        a = load_floats(ptr, columns, mask & (columns < K))
        b = load_floats(ptr, columns + 1, mask & (columns + 1 < K))
        c = load_floats(ptr, columns + 2, mask & (columns + 2 < K))
        d = load_floats(ptr, columns + 3, mask & (columns + 3 < K))
    return a, b, c, d
