#!/usr/bin/env python3
"""Rounding error of packed weights beside llama.cpp's formats: the same random matrices, both quantisers, RMS error and bits a weight.

Writes a small OLMoE checkpoint whose experts' gate matrices are Gaussian and up matrices Laplacian, quantises it with `winnow quantize`
and (as GGUF) with llama.cpp, each to its formats without calibration, and reads both back: ours by the layout of docs/FORMATS.md, theirs with the
`gguf` package. The error is relative to the root mean square of the weights.
"""
import argparse
import json
import os
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import llama_cpp_model as llama  # noqa: E402

ROWS, COLUMNS = 256, 2048
# Levels of the curved grids, in 64ths of the scale (docs/FORMATS.md).
CURVES = {2: [-127, -46, 6, 70], 3: [-127, -78, -45, -20, 0, 22, 49, 88],
          4: [-127, -98, -79, -64, -50, -36, -23, -11, 0, 11, 23, 36, 50, 65, 83, 105]}
PLANES = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}  # docs/FORMATS.md
SOURCES = {"gaussian": "gate", "laplace": "up"}


def parse_format(name):
    """(bits, columns of a group, asymmetric, shifted) of "4bit-asym-g64"."""
    parts = name.split("-")
    group = next((int(part[1:]) for part in parts[1:] if part[0] == "g"), 32)
    return int(parts[0].removesuffix("bit")), group, "asym" in parts, "shift" in parts or "curve" in parts


def unpack(data, name, rows, columns):
    """float32 [rows, columns] of a packed matrix at the start of `data`, and the bytes it takes."""
    import numpy
    bits, group, asymmetric, shifted = parse_format(name)
    groups, chunks, blocks = -(-columns // group), -(-columns // 32), -(-rows // 16)
    scale_bytes = -(-groups * 32 * (2 if asymmetric else 1) // 64) * 64
    size = blocks * (scale_bytes + chunks * 64 * bits)
    block = data[:size].reshape(blocks, -1)
    halves = block[:, :scale_bytes].copy().view("<u2")[:, :groups * (32 if asymmetric else 16)]
    if shifted:  # the last 5 bits are the shift's
        scales = (halves & 0xffe0).view("<f2").astype(numpy.float32) / 256
        scales = numpy.concatenate([scales, (halves & 31).astype(numpy.float32) - 16], axis=1)
    else:
        scales = halves.view("<f2").astype(numpy.float32)
    scales = scales.reshape(blocks, -1, groups, 16)
    vectors = block[:, scale_bytes:].reshape(blocks, chunks, bits, 64)
    codes = numpy.zeros((blocks, chunks, 8, 64), numpy.uint8)
    first = 0
    for plane in PLANES[bits]:
        for v in range(8):
            part = vectors[:, :, first + v % plane] >> (v // plane * plane)
            codes[:, :, v] |= (part & (2 ** plane - 1)) << first
        first += plane
    # [blocks, chunks, 8 vectors, 16 rows, 4 columns] -> [rows, columns]
    codes = codes.reshape(blocks, chunks, 8, 16, 4).transpose(0, 3, 1, 2, 4).reshape(blocks * 16, chunks * 32)
    spread = [numpy.repeat(scales[:, i].transpose(0, 2, 1).reshape(blocks * 16, groups), group, axis=1)[:, :chunks * 32]
              for i in range(scales.shape[1])]
    if "curve" in name:
        values = (numpy.array(CURVES[bits], numpy.float32)[codes] + 1.5 * spread[1]) * (spread[0] / 64)
    elif shifted:
        values = (codes.astype(numpy.float32) - 2 ** (bits - 1) + spread[1] * (3 * 2 ** bits / 256)) * spread[0]
    elif asymmetric:
        values = codes * spread[0] + spread[1]
    else:
        values = (codes.astype(numpy.float32) - 2 ** (bits - 1)) * spread[0]
    return values[:rows, :columns], size


def write_source(args, folder):
    """The checkpoint, and {distribution: float32 matrix of expert 0}."""
    import numpy
    llama.run(args.synthetic, "--family", "olmoe", "--hidden", COLUMNS, "--layers", 1, "--heads", 16, "--kv-heads", 16, "--head-dim", COLUMNS // 16,
              "--vocab", 512, "--experts", 2, "--top-k", 1, "--expert-width", ROWS, "-o", folder)
    path = next(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".safetensors"))
    data = numpy.memmap(path, mode="r+")
    header = int.from_bytes(data[:8].tobytes(), "little")
    entries = json.loads(data[8:8 + header].tobytes())
    generator = numpy.random.default_rng(7)
    matrices = {}
    for distribution, kind in SOURCES.items():
        for expert in (1, 0):
            drawn = (generator.standard_normal if distribution == "gaussian" else generator.laplace)(size=(ROWS, COLUMNS)).astype(numpy.float32)
            bf16 = ((0.02 * drawn).astype(numpy.float32).view(numpy.uint32) + 0x8000 >> 16).astype("<u2")
            begin, end = entries[f"model.layers.0.mlp.experts.{expert}.{kind}_proj.weight"]["data_offsets"]
            data[8 + header + begin:8 + header + end] = bf16.view(numpy.uint8).ravel()
            matrices[distribution] = (bf16.astype(numpy.uint32) << 16).view(numpy.float32)
    data.flush()
    return matrices


def ours(args, source, name, tmp):
    folder = os.path.join(tmp, name)
    # Bits alone are the even grid in config.json, and the best one for the command.
    bits, group, asymmetric, shifted = parse_format(name)
    flags = [name] if asymmetric or shifted else [f"{bits}bit", "--grid", "linear", "--group", group]
    llama.run(args.winnow, "quantize", source, "--experts", *flags, "-o", folder, "-q")
    checkpoint = llama.Checkpoint(folder)
    tensor = next(tensor for tensor in checkpoint.entries if ".experts.0." in tensor and checkpoint.dtype(tensor) == "U8")
    data = checkpoint.bytes(tensor)
    gate, size = unpack(data, name, ROWS, COLUMNS)
    return {"gaussian": gate, "laplace": unpack(data[size:], name, ROWS, COLUMNS)[0]}, size


def theirs(source, kind, tmp):
    import gguf
    path = os.path.join(tmp, kind + ".gguf")
    llama.quantise_gguf(source, path, kind)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for distribution, part in SOURCES.items():
        tensor = tensors[f"blk.0.ffn_{part}_exps.weight"]
        if tensor.tensor_type.name != kind.upper():
            sys.exit(f"{tensor.name}: {tensor.tensor_type.name}, expected {kind.upper()}")
        found[distribution] = gguf.dequantize(tensor.data, tensor.tensor_type)[0]
    return found, tensor.n_bytes // 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--winnow", default=os.path.join(ROOT, "build/release/winnow"))
    parser.add_argument("--synthetic", default=os.path.join(ROOT, "build/release/tools/make_synthetic_checkpoint"))
    parser.add_argument("--environment", default=os.path.join(ROOT, "build/llama_cpp_environment"), help="Python environment, made if missing")
    parser.add_argument("--ours", nargs="+", default=["8bit", "8bit-shift", "6bit", "6bit-shift", "5bit", "5bit-shift", "4bit", "4bit-shift", "4bit-curve", "4bit-asym-g64", "3bit", "3bit-curve", "3bit-asym-g64", "2bit-asym", "2bit-curve"])
    parser.add_argument("--theirs", nargs="+", default=["q8_0", "q6_k", "q5_k", "q4_0", "q4_k", "q3_k", "q2_k"])
    args = parser.parse_args()
    llama.enter_environment(args.environment)
    import numpy
    with tempfile.TemporaryDirectory() as tmp:
        source, base = os.path.join(tmp, "source"), os.path.join(tmp, "source.gguf")
        matrices = write_source(args, source)
        llama.write_gguf(source, base)
        rows = [("winnow", name, *ours(args, source, name, tmp)) for name in args.ours]
        rows += [("llama.cpp", kind, *theirs(base, kind, tmp)) for kind in args.theirs]
    print(f"| program | format | bits a weight | {' | '.join(SOURCES)} |\n|---|---|--:|{'--:|' * len(SOURCES)}")
    for program, name, found, size in sorted(rows, key=lambda row: -row[3]):
        errors = [numpy.sqrt(((found[key] - value) ** 2).mean() / (value ** 2).mean()) for key, value in matrices.items()]
        print(f"| {program} | {name} | {8 * size / ROWS / COLUMNS:.4g} | {' | '.join(f'{100 * error:.3f} %' for error in errors)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
