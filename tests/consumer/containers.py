#!/usr/bin/env python3
"""Lets the readers of containers and of other tools' files judge.

    containers.py --tool target/release/onnx-quant

Checked: ONNX Runtime runs `--target packed` bit for bit as the plain file, and safetensors reads the codes that the manifest names; what
ONNX Runtime's own tool writes (QDQ and QOperator) converts to QDQ and computes the same to one step, and to QONNX; Icarus Verilog and a C
compiler read what `--target rtl-mem` writes, where they are installed.
"""
import argparse, hashlib, json, shutil, subprocess, sys, tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from safetensors.numpy import load_file

from processor import SATURATES

ROOT = Path(__file__).resolve().parents[2]
MODEL, DATA = ROOT / 'fixtures/models/digits-resnet.onnx', ROOT / 'fixtures/data/digits'


def session(path, optimized):
    o = ort.SessionOptions(); o.log_severity_level = 3
    if not optimized: o.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), o, providers=['CPUExecutionProvider'])


def run(path, x, optimized=False):
    return session(path, optimized).run(None, {'input': x})[0]


def tool(binary, *arguments):
    subprocess.run([binary, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def quantize(binary, out, *options):
    tool(binary, 'quantize', MODEL, '--data', DATA, '-o', out, '--progress', 'none', *options)


def packed(binary, x, tmp):
    plain, folder = tmp / 'plain.onnx', tmp / 'packed'
    quantize(binary, plain); quantize(binary, folder, '--target', 'packed')
    onnx.checker.check_model(str(folder / 'model.onnx'), full_check=True)
    same = all((run(plain, x, fast) == run(folder / 'model.onnx', x, fast)).all() for fast in (False, True))
    tensors, manifest = load_file(str(folder / 'model.safetensors')), json.loads((folder / 'manifest.json').read_text())
    hashes = {hashlib.sha256(t.tobytes()).hexdigest() for t in tensors.values()}
    large = [w for w in manifest['weights'] if w['bits'] == 8 and np.prod(w['shape']) >= 1024]
    found = sum(w['sha256_of_codes'] in hashes for w in large)
    print(f'packed: ONNX Runtime bit for bit {same}; safetensors reads {found} of {len(large)} large weights, {len(tensors)} tensors')
    return same and found == len(large) and found > 4


class Digits(CalibrationDataReader):
    def __init__(self): self.rows = iter(np.concatenate([np.load(f)['input'] for f in sorted(DATA.glob('*.npz'))])[:32])

    def get_next(self):
        row = next(self.rows, None)
        return None if row is None else {'input': row[None]}


def from_onnxruntime(binary, x, tmp):
    from onnxruntime.quantization.shape_inference import quant_pre_process
    good = True
    prepared = tmp / 'prepared.onnx'
    quant_pre_process(str(MODEL), str(prepared), skip_symbolic_shape=True)
    for kind in QuantFormat.QDQ, QuantFormat.QOperator:
        theirs, ours, qonnx = (tmp / f'{kind.name}.{what}.onnx' for what in ('theirs', 'ours', 'qonnx'))
        quantize_static(str(prepared), str(theirs), Digits(), quant_format=kind, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=SATURATES)
        tool(binary, 'convert', theirs, '--target', 'onnx-qdq', '-o', ours, '--data', DATA)
        tool(binary, 'convert', ours, '--target', 'qonnx', '-o', qonnx)
        a, b = run(theirs, x), run(ours, x)
        step = np.diff(np.unique(a)).min()
        steps = np.abs(a - b).max() / step
        agree = (a.argmax(1) == b.argmax(1)).mean()
        # QLinear kernels round their products otherwise than float ones at ties, and what follows sees it.
        ok = agree >= 0.99 and (steps <= 1 if kind == QuantFormat.QDQ else steps <= 4)
        left = sorted({n.op_type for n in onnx.load(str(ours)).graph.node if n.op_type.startswith('QLinear') or n.op_type == 'QGemm'})
        print(f'{kind.name} of ONNX Runtime: converted, {steps:.2f} steps off, labels agree {agree:.4f}' + (f', left {left}' if left else '') + ('' if ok and not left else '   FAILED'))
        good = good and ok and not left
    return good


def memories(binary, tmp):
    out = tmp / 'rtl'
    quantize(binary, out, '--target', 'rtl-mem', '--scheme', 'w6a6', '--memory', 'pe=4,simd=4,format=mem')
    manifest = json.loads((out / 'manifest.json').read_text())
    good = True
    if shutil.which('iverilog'):
        for entry in manifest['memories']:
            words = (out / entry['file']).read_text().split()
            (tmp / 't.v').write_text(f'''module t; reg [{entry["word_bits"] - 1}:0] m [0:{len(words) - 1}]; integer i;
initial begin $readmemh("{out / entry['file']}", m); for (i = 0; i < {len(words)}; i = i + 1) $display("%h", m[i]); end endmodule''')
            subprocess.run(['iverilog', '-o', str(tmp / 't.vvp'), str(tmp / 't.v')], check=True)
            shown = subprocess.run(['vvp', '-n', str(tmp / 't.vvp')], check=True, capture_output=True, text=True).stdout.split()
            good = good and shown == words
        print(f'rtl-mem: Icarus Verilog reads {len(manifest["memories"])} memories' + ('' if good else '   FAILED'))
    else:
        print('rtl-mem: skipped, Icarus Verilog (iverilog) is not installed')
    compiler = shutil.which('cc') or shutil.which('gcc')
    if compiler:
        (tmp / 't.c').write_text('#include <stdio.h>\n#include "weights.h"\nint main(void) { long sum = 0; for (unsigned i = 0; i < sizeof 0_weight; i++) sum += 0_weight[i]; printf("%ld", sum); }'.replace('0_weight', next(e['file'] for e in manifest['memories'] if e['role'] == 'weight').replace('.mem', '').replace('.', '_')))
        subprocess.run([compiler, '-Wno-unused-variable', '-I', str(out), str(tmp / 't.c'), '-o', str(tmp / 't')], check=True)
        said = int(subprocess.run([str(tmp / 't')], check=True, capture_output=True, text=True).stdout)
        entry = next(e for e in manifest['memories'] if e['role'] == 'weight')
        total = 0
        for word in (out / entry['file']).read_text().split():
            for lane in range(entry['pe'] * entry['simd']):
                code = int(word, 16) >> (lane * entry['bits']) & ((1 << entry['bits']) - 1)
                total += code - ((code >> (entry['bits'] - 1)) << entry['bits'])
        good = good and said == total
        print(f'rtl-mem: the C header compiles, its codes sum up to {said}, those of the memory to {total}')
    else:
        print('rtl-mem: the C header is not compiled, there is no compiler')
    return good


# Two products with names as exporters give them.
LINEAR = '''opset 21
graph (%x: f32[batch,256]) -> (%y: f32[batch,64]) {
  %layers.0.fc1.weight = const f32[256,128] rand(seed=7, std=0.05)
  %layers.0.fc2.weight = const f32[128,64] rand(seed=8, std=0.05)
  %h = MatMul(%x, %layers.0.fc1.weight)
  %r = Relu(%h)
  %y = MatMul(%r, %layers.0.fc2.weight)
}
'''


def unpacked(words, bits, columns):
    """Codes of each row of int32 words, the first in the lowest bits."""
    stream = np.unpackbits(words.view(np.uint8).reshape(len(words), -1), axis=1, bitorder='little')
    return (stream[:, :columns * bits].reshape(len(words), columns, bits) << np.arange(bits)).sum(2).astype(np.int64)


def tensors_of(path):
    """As safetensors' own reader has them, but that knows no 8-bit floats in numpy: those come as bytes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], 'little')
    types = {'I32': np.int32, 'I64': np.int64, 'F32': np.float32, 'F8_E4M3': np.uint8}
    header = json.loads(data[8:8 + size])
    tensors = {}
    for name, info in header.items():
        begin, end = info['data_offsets']
        tensors[name] = np.frombuffer(data[8 + size + begin:8 + size + end], types[info['dtype']]).reshape(info['shape'])
    if not any(info['dtype'].startswith('F8') for info in header.values()):
        theirs = load_file(str(path))
        assert all((theirs[name] == tensor).all() for name, tensor in tensors.items())
    return tensors


def compressed(binary, tmp):
    text, plain = tmp / 'linear.oq', tmp / 'linear.onnx'
    text.write_text(LINEAR)
    tool(binary, 'cat', text, '--to', 'onnx', '-o', plain)
    good = True
    for scheme, bits, group in ('w4a16g32', 4, 32), ('w3a16g64asym', 3, 64), ('w8a16', 8, 256), ('wfp8a16', 8, 256):
        folder, qdq = tmp / scheme, tmp / f'{scheme}.onnx'
        tool(binary, 'quantize', plain, '--target', 'safetensors-ct', '--scheme', scheme, '-o', folder)
        tensors, config = tensors_of(folder / 'model.safetensors'), json.loads((folder / 'config.json').read_text())['quantization_config']
        weights = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(str(plain)).graph.initializer}
        name, worst = 'layers.0.fc1', 0
        want = weights[f'{name}.weight'].T
        scale = tensors[f'{name}.weight_scale'].repeat(group, axis=1)
        if 'fp8' in scheme:
            value = tensors[f'{name}.weight'].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
        else:
            shape = tensors[f'{name}.weight_shape']
            codes = unpacked(tensors[f'{name}.weight_packed'], bits, shape[1])
            zero = 1 << (bits - 1)
            if 'asym' in scheme:
                zero = unpacked(np.ascontiguousarray(tensors[f'{name}.weight_zero_point'].T), bits, shape[0]).T.repeat(group, axis=1)
            value = (codes - zero) * scale
        # A code is at most half a step off, or cut at the end of its range.
        worst = float(np.sqrt(((value - want) ** 2).mean() / (want ** 2).mean()))
        ok = worst < {3: 0.25, 4: 0.15, 8: 0.05}[bits] and config['quant_method'] == 'compressed-tensors'
        print(f'safetensors-ct {scheme}: {config["format"]}, {len(tensors)} tensors, error {worst:.4f} of the weights' + ('' if ok else '   FAILED'))
        good = good and ok
    return good


def main():
    p = argparse.ArgumentParser(); p.add_argument('--tool', required=True); a = p.parse_args()
    x = np.load(ROOT / 'fixtures/data/digits-eval.npz')['images'].astype(np.float32)[:200, None] / 255
    with tempfile.TemporaryDirectory() as tmp:
        results = [packed(a.tool, x, Path(tmp)), from_onnxruntime(a.tool, x, Path(tmp)), memories(a.tool, Path(tmp)), compressed(a.tool, Path(tmp))]
    print('all good' if all(results) else 'FAILED')
    return 0 if all(results) else 1


if __name__ == '__main__':
    sys.exit(main())
