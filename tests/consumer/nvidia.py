#!/usr/bin/env python3
"""Judges what is written for TensorRT without a GPU: the reference evaluator of the onnx package computes it, TensorRT's own operators as
their documentation says it, in numpy, independently of this project's simulation.

    nvidia.py --tool target/release/onnx-quant

Checked: a network of two products, written as wnvfp4anvfp4 and wmxfp8amxfp8, passes onnx.checker and computes what the tool's own
simulation (`run`) does, and so do w8a8 and w4a16g64; each of them again with the rest in 16 bits (`--rest f16`), which the evaluator
then computes in 16 bits.
"""
import argparse, subprocess, sys, tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from safetensors.numpy import load_file

E2M1, E4M3 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn


def blocks(x, axis, size):
    """x with its last axis in front cut into blocks."""
    moved = np.moveaxis(x.astype(np.float32), axis, -1)
    return moved.reshape(*moved.shape[:-1], -1, size)


def joined(x, axis):
    return np.moveaxis(x.reshape(*x.shape[:-2], -1), -1, axis)


class TRT_FP4DynamicQuantize(OpRun):
    op_domain = 'trt'

    def _run(self, x, factor, axis=None, block_size=None, scale_type=None):
        b = blocks(x, axis, block_size)
        scale = (np.abs(b).max(-1) / np.float32(6) / factor).astype(E4M3)
        real = scale.astype(np.float32) * factor
        codes = np.divide(b, real[..., None], out=np.zeros_like(b), where=real[..., None] > 0)
        return joined(np.clip(codes, -6, 6), axis).astype(E2M1), np.moveaxis(scale, -1, axis)


class TRT_MXFP8DynamicQuantize(OpRun):
    op_domain = 'trt'

    def _run(self, x, axis=None, block_size=None, output_dtype=None):
        b = blocks(x, axis, block_size)
        peak = np.abs(b).max(-1).astype(np.float64) / 448
        exponent = np.where(peak > 0, np.ceil(np.log2(np.maximum(peak, 1e-38))), 0)
        codes = b / np.exp2(exponent)[..., None].astype(np.float32)
        return joined(np.clip(codes, -448, 448), axis).astype(E4M3), np.moveaxis((exponent + 127).astype(np.uint8), -1, axis)


class TRT_MXFP8DequantizeLinear(OpRun):
    op_domain = 'trt'

    def _run(self, codes, scale, axis=None, block_size=None, output_dtype=None):
        real = np.exp2(scale.astype(np.float32) - 127)
        return (codes.astype(np.float32) * np.repeat(real, block_size, axis),)


SCHEMES = [('wnvfp4anvfp4', 12), ('wmxfp8amxfp8', 25), ('w8a8', 30), ('w4a16g64', 15)]
OPS = [TRT_FP4DynamicQuantize, TRT_MXFP8DynamicQuantize, TRT_MXFP8DequantizeLinear]


def network(path):
    """x [N, 128] -> Gemm (as PyTorch writes it) -> Relu -> MatMul -> y [N, 32]."""
    rng = np.random.default_rng(5)
    tensor = lambda name, *shape: numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32), name)
    nodes = [
        helper.make_node('Gemm', ['x', 'w1', 'b1'], ['h'], 'first', transB=1),
        helper.make_node('Relu', ['h'], ['r'], 'relu'),
        helper.make_node('MatMul', ['r', 'w2'], ['y'], 'second'),
    ]
    value = lambda name, *shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, 'two', [value('x', 'N', 128)], [value('y', 'N', 32)], [tensor('w1', 64, 128), tensor('b1', 64), tensor('w2', 64, 32)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=9), str(path))
    return rng


def main():
    p = argparse.ArgumentParser(); p.add_argument('--tool', required=True)
    tool = p.parse_args().tool
    good = True
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp); data = tmp / 'data'; data.mkdir()
        rng = network(tmp / 'float.onnx')
        x = (rng.standard_normal((16, 128)) * np.exp(rng.standard_normal((16, 1)))).astype(np.float32)
        np.savez(data / 'x.npz', x=x)
        run = lambda *a: subprocess.run([tool, *map(str, a)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        exact = ReferenceEvaluator(str(tmp / 'float.onnx')).run(None, {'x': x})[0]
        for scheme, rest, least in (*((s, 'f32', db) for s, db in SCHEMES), *((s, 'f16', db) for s, db in SCHEMES)):
            file = tmp / f'{scheme}.{rest}.onnx'
            run('quantize', tmp / 'float.onnx', '-o', file, '--target', 'tensorrt', '--scheme', scheme, '--rest', rest, '--data', data, '--progress', 'none')
            run('run', file, '--data', data, '-o', tmp / 'ours.safetensors')
            model = onnx.load(str(file))
            onnx.checker.check_model(model, full_check=False)
            theirs = ReferenceEvaluator(model, new_ops=OPS).run(None, {'x': x})[0]
            ours = next(t for name, t in load_file(str(tmp / 'ours.safetensors')).items() if t.shape[-1] == 32)
            off = np.abs(ours.reshape(theirs.shape) - theirs).max() / np.abs(theirs).max()
            db = 10 * np.log10((exact ** 2).sum() / ((exact - theirs) ** 2).sum())
            kinds = sorted({n.op_type for n in model.graph.node if n.domain})
            # The simulation computes in f32, on the constants that 16 bits hold.
            halves = sum(v.data_type == TensorProto.FLOAT16 for v in model.graph.initializer)
            ok = off < (1e-5 if rest == 'f32' else 1e-2) and db > least and (halves > 0) == (rest == 'f16')
            good &= ok
            print(f'{scheme}, rest {rest}: the evaluator of onnx is {off:.1e} of the largest output from our simulation, {db:.1f} dB to float {kinds}{"" if ok else "   FAILED"}')
    print('all passed' if good else 'FAILED')
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
