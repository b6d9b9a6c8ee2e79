#!/usr/bin/env python3
"""Lets OpenVINO's CPU plugin judge what `--target openvino-cpu` writes.

    openvino_cpu.py --tool target/release/onnx-quant

Checked: every convolution and product of the runtime model computes on u8 or i8, or keeps its weights in 4 or 8 bits beside float
activations; the outputs are those of ONNX Runtime without optimization to two steps of the last scale (convolutions are integers in
both; what is scaled between them may round otherwise at a tie).
"""
import argparse, collections, subprocess, sys, tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import openvino as ov

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ('Convolution', 'GroupConvolution', 'FullyConnected', 'MatMul')
# A perceptron with weights in blocks: two products, one with zero points.
PRODUCTS = '''opset 21
graph (%x: f32[batch,256]) -> (%y: f32[batch,64]) {
  %w = const f32[256,128] rand(seed=7, std=0.05)
  %v = const f32[128,64] rand(seed=8, std=0.05)
  %h = MatMul(%x, %w)
  %r = Relu(%h)
  %y = MatMul(%r, %v)
}
'''


def quantize(tool, model, out, *options):
    subprocess.run([tool, 'quantize', str(model), '-o', str(out), '--target', 'openvino-cpu', '--progress', 'none', *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def reference(model, feeds):
    o = ort.SessionOptions(); o.log_severity_level = 3
    o.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(model), o, providers=['CPUExecutionProvider']).run(None, feeds)[0]


def run(model, feeds, **config):
    core = ov.Core()
    compiled = core.compile_model(core.read_model(str(model)), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32', **config})
    result = compiled(feeds)[0]
    nodes = collections.Counter()
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        kind, precision = (info[key].astype(str) for key in ('layerType', 'runtimePrecision'))
        if kind in HEAVY:
            # Weights that are packed into a kernel are no input any more: the precision of the computation tells.
            weights = str(op.input(1).get_element_type().get_type_name()) if op.get_input_size() > 1 else '-'
            nodes[(kind, precision, weights)] += 1
    return result, nodes


def main():
    p = argparse.ArgumentParser(); p.add_argument('--tool', required=True); a = p.parse_args()
    failures = 0
    held = np.load(ROOT / 'fixtures/data/digits-eval.npz')
    x, y = held['images'].astype(np.float32)[:, None] / 255, held['labels']
    with tempfile.TemporaryDirectory() as tmp:
        for name in 'digits-resnet', 'digits-mobilenet':
            model, out = ROOT / 'fixtures/models' / f'{name}.onnx', Path(tmp) / f'{name}.onnx'
            quantize(a.tool, model, out, '--data', str(ROOT / 'fixtures/data/digits'))
            ours, nodes = run(out, {'input': x})
            want = reference(out, {'input': x})
            step = np.diff(np.unique(want)).min()
            steps = np.abs(ours - want).max() / max(step, 1e-9)
            agree = (ours.argmax(1) == want.argmax(1)).mean()
            integers = all(precision in ('u8', 'i8') for (_, precision, _) in nodes)
            good = integers and agree >= 0.998 and sum(nodes.values()) == 10
            failures += not good
            print(f'{name:17} {dict(nodes)} accuracy {(ours.argmax(1) == y).mean():.3f} agrees {agree:.4f} with ONNX Runtime' + ('' if good else '   FAILED'))
        text, plain = Path(tmp) / 'products.oq', Path(tmp) / 'products.onnx'
        text.write_text(PRODUCTS)
        subprocess.run([a.tool, 'cat', str(text), '--to', 'onnx', '-o', str(plain)], check=True)
        feed = np.random.default_rng(1).normal(size=(16, 256)).astype(np.float32)
        for scheme, kept in ('w4a16g32', 'i4'), ('w4a16g32asym', 'u4'), ('w8a16g64', 'i8'):
            out = Path(tmp) / f'{scheme}.onnx'
            quantize(a.tool, plain, out, '--scheme', scheme)
            # Without its own rounding of activations, which no file asks for.
            ours, nodes = run(out, {'x': feed}, DYNAMIC_QUANTIZATION_GROUP_SIZE='0')
            want = reference(out, {'x': feed})
            error = np.abs(ours - want).max() / np.abs(want).max()
            good = error < 1e-4 and all(weights == kept for (_, _, weights) in nodes) and sum(nodes.values()) == 2
            failures += not good
            print(f'{scheme:17} {dict(nodes)} {error:.1e} from ONNX Runtime' + ('' if good else '   FAILED'))
    print(f'{failures} failures')
    return 1 if failures else 0


if __name__ == '__main__':
    sys.exit(main())
