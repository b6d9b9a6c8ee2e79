#!/usr/bin/env python3
"""Lets the reader of compressed-tensors judge `--target safetensors-ct`: it decompresses every layer by the configuration beside it.

    compressed.py --tool target/release/onnx-quant

Checked, for every layout: the reader takes the configuration and the tensors, picks the same format for it, and what it decompresses is at
most half a step of the format from the float weights (rounded to nearest, ranges not cut).
"""
import argparse, json, subprocess, sys, tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

# Scheme, format, and half the largest step relative to the largest magnitude that shares a scale.
SCHEMES = [
    ('w4a16g32', 'pack-quantized', 0.5 / 7), ('w3a16g64asym', 'pack-quantized', 1.0 / 7), ('w8a16', 'pack-quantized', 0.5 / 127),
    ('w8a8', 'int-quantized', 0.5 / 127), ('wfp8a16', 'naive-quantized', 16 / 448), ('wfp8afp8', 'float-quantized', 16 / 448),
    ('wnvfp4a16', 'nvfp4-pack-quantized', 1.0 / 4), ('wmxfp4a16', 'mxfp4-pack-quantized', 1.0 / 3), ('wmxfp8a16', 'mxfp8-quantized', 64 / 448),
]


def network(path):
    """x [N, 128] -> Linear as PyTorch writes it -> Relu -> Linear as a MatMul -> y."""
    rng = np.random.default_rng(11)
    weights = {'layers.0.weight': rng.standard_normal((128, 128)), 'layers.2.weight': rng.standard_normal((128, 64))}
    weights = {name: (w / 10).astype(np.float32) for name, w in weights.items()}
    nodes = [helper.make_node('Gemm', ['x', 'layers.0.weight'], ['h'], 'first', transB=1), helper.make_node('Relu', ['h'], ['r'], 'relu'),
             helper.make_node('MatMul', ['r', 'layers.2.weight'], ['y'], 'second')]
    value = lambda name, *shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    initializers = [numpy_helper.from_array(w, name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, 'two', [value('x', 'N', 128)], [value('y', 'N', 64)], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=9), str(path))
    return rng, {'layers.0': weights['layers.0.weight'], 'layers.2': weights['layers.2.weight'].T}


def judge(folder, floats, expected, bound):
    raw = json.loads((folder / 'config.json').read_text())['quantization_config']
    config = QuantizationConfig.model_validate(raw)
    (scheme,) = config.config_groups.values()
    tensors = load_file(str(folder / 'model.safetensors'))
    worst = 0.0
    for module, weight in floats.items():
        state = {name.removeprefix(module + '.'): t for name, t in tensors.items() if name.startswith(module + '.')}
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        if infer_module_format(torch.nn.Linear, scheme) != scheme.format:
            return False, f'{module}: its reader says that {scheme.format} does not go with the scheme'
        back = compressor.decompress(state, scheme)['weight'].to(torch.float32).numpy()
        if back.shape != weight.shape:
            return False, f'{module}: {back.shape} instead of {weight.shape}'
        group = scheme.weights.group_size or weight.shape[1]
        cut = np.abs(weight).reshape(len(weight), -1, group)
        worst = max(worst, float((np.abs(back - weight).reshape(cut.shape) / cut.max(-1, keepdims=True)).max()))
    inputs = sum('input_scale' in name for name in tensors)
    wanted = len(floats) if scheme.input_activations else 0
    good = scheme.format == expected == config.format and worst <= bound * 1.01 and inputs == wanted
    return good, f'{config.format}, {len(tensors)} tensors, at most {worst:.4f} of the largest weight of a group off (half a step is {bound:.4f})'


def main():
    p = argparse.ArgumentParser(); p.add_argument('--tool', required=True)
    tool, good = p.parse_args().tool, True
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        rng, floats = network(tmp / 'float.onnx')
        np.savez(tmp / 'x.npz', x=rng.standard_normal((16, 128)).astype(np.float32))
        for scheme, expected, bound in SCHEMES:
            command = [tool, 'quantize', tmp / 'float.onnx', '-o', tmp / scheme, '--target', 'safetensors-ct', '--scheme', scheme, '--data', tmp / 'x.npz',
                       '--recipe', 'fast', '--rounding', 'nearest', '--progress', 'none']
            subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
            ok, text = judge(tmp / scheme, floats, expected, bound)
            print(f'{scheme}: {text}' + ('' if ok else '   FAILED'))
            good &= ok
    print('all passed' if good else 'FAILED')
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
