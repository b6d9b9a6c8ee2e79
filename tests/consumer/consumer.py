#!/usr/bin/env python3
"""Quantizes the fixture models and lets their consumer judge: onnx's checker, and ONNX Runtime with and without optimization.

    consumer.py --tool target/release/onnx-quant

Checked per model: the file passes onnx.checker (full); ONNX Runtime's optimized graph has no float Conv, no Gemm and no more
dequantize nodes than results that leave in float; accuracy on held digits is within 0.6 points (3 of 500) of float; the outputs
keep at least 30 dB; an If model keeps its branches and runs unchanged.
"""
import argparse, collections, json, subprocess, sys, tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from processor import CPU, SATURATES

ROOT = Path(__file__).resolve().parents[2]
# ONNX Runtime 1.22 computes MatMulNBits in float for 4 bits only, and says so.
ONLY_FOUR_BITS = tuple(map(int, ort.__version__.split('.')[:2])) <= (1, 22)
# Plain weights in blocks that newer ones fuse, beside those of 4 bits.
FUSED = ('w2a16g16', 'w2a16g32asym', 'w8a16g32')


def session(path, optimized=True, dump=None):
    o = ort.SessionOptions(); o.log_severity_level = 3
    if not optimized: o.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if dump: o.optimized_model_filepath = str(dump)
    return ort.InferenceSession(str(path), o, providers=['CPUExecutionProvider'])


def operators(path, tmp):
    dump = Path(tmp) / 'optimized.onnx'
    session(path, dump=dump)
    return collections.Counter(n.op_type for n in onnx.load(str(dump)).graph.node)


def sqnr(a, b):
    return 10 * np.log10(np.square(a).sum() / max(np.square(a - b).sum(), 1e-30))


def digits(tool, name, tmp):
    model, out = ROOT / 'fixtures/models' / f'{name}.onnx', Path(tmp) / f'{name}.q.onnx'
    subprocess.run([tool, 'quantize', str(model), '--data', str(ROOT / 'fixtures/data/digits'), '-o', str(out), '--progress', 'none', *CPU], check=True, stdout=subprocess.DEVNULL)
    onnx.checker.check_model(str(out), full_check=True)
    held = np.load(ROOT / 'fixtures/data/digits-eval.npz')
    x, y = held['images'].astype(np.float32)[:, None] / 255, held['labels']
    want = session(model).run(None, {'input': x})[0]
    plain, fused = (session(out, optimized).run(None, {'input': x})[0] for optimized in (False, True))
    ops = operators(out, tmp)
    accuracy = [float((o.argmax(1) == y).mean()) for o in (want, plain, fused)]
    print(f'{name}: float {accuracy[0]:.3f}, quantized {accuracy[1]:.3f}, fused {accuracy[2]:.3f}, {sqnr(want, plain):.1f} dB; {dict(ops)}')
    assert ops['Conv'] == ops['Gemm'] == ops['BatchNormalization'] == 0, 'a float kernel is left'
    assert ops['QLinearConv'] == 9 and ops['DequantizeLinear'] <= 1 and ops['QuantizeLinear'] <= 1, 'a stray quantizer is left'
    assert max(accuracy[0] - a for a in accuracy[1:]) <= 0.0061, 'accuracy is lost'
    assert sqnr(want, plain) >= 30, 'the outputs are too far off'


def halves(tool, tmp):
    """The rest in 16-bit floats, and a model that comes in 16-bit floats."""
    model, data = ROOT / 'fixtures/models/digits-resnet.onnx', ROOT / 'fixtures/data/digits'
    held = np.load(ROOT / 'fixtures/data/digits-eval.npz')
    x = held['images'].astype(np.float32)[:, None] / 255
    want = session(model).run(None, {'input': x})[0]
    files = [Path(tmp) / f'halves.{what}.onnx' for what in ('rest', 'float', 'quantized')]
    for source, out, options in [(model, files[0], ['--rest', 'f16']), (model, files[1], ['--rest', 'f16', '--keep-float', '*']), (files[1], files[2], CPU)]:
        target = 'ort-cpu' if source == files[1] else 'tensorrt'
        subprocess.run([tool, 'quantize', str(source), '--data', str(data), '-o', str(out), '--target', target, *options, '--progress', 'none'], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        onnx.checker.check_model(str(out), full_check=True)
    found = [sqnr(want, session(file).run(None, {'input': x})[0]) for file in files]
    kinds = [{i.data_type for i in onnx.load(str(file)).graph.initializer} for file in files]
    print(f'16-bit floats: the rest {found[0]:.1f} dB, the whole {found[1]:.1f} dB, quantized from that {found[2]:.1f} dB')
    assert [onnx.TensorProto.FLOAT16 in kind for kind in kinds] == [True, True, False], kinds
    assert onnx.TensorProto.FLOAT not in kinds[0] | kinds[1], kinds
    # Quantizing 16-bit floats, 1.22 computes something else: 17.3 dB.
    assert (found[0] > 30 or ONLY_FOUR_BITS) and found[1] > 55 and found[2] > 30, found


def formats(tool, tmp):
    """8-bit floats as written for any consumer, run without the optimizer; other formats as weights, with it."""
    model, data = ROOT / 'fixtures/models/digits-resnet.onnx', ROOT / 'fixtures/data/digits'
    held = np.load(ROOT / 'fixtures/data/digits-eval.npz')
    x, y = held['images'].astype(np.float32)[:, None] / 255, held['labels']
    want = session(model).run(None, {'input': x})[0]
    for scheme, target, optimized, least in (('wfp8afp8', 'onnx-qdq', False, 18), ('wfp8a16', 'ort-cpu', True, 25), ('we2m1a8', 'ort-cpu', True, 18), ('wmxfp4a16', 'ort-cpu', True, 18), ('w4a8asym', 'onnx-qdq', True, 20), ('w4a8asym', 'onnx-qdq', False, 20)):
        out = Path(tmp) / f'{scheme}.onnx'
        subprocess.run([tool, 'quantize', str(model), '--data', str(data), '-o', str(out), '--scheme', scheme, '--target', target, '--recipe', 'best', '--progress', 'none'], check=True, stdout=subprocess.DEVNULL)
        got = session(out, optimized).run(None, {'input': x})[0]
        print(f'{scheme} for {target}: accuracy {float((got.argmax(1) == y).mean()):.3f}, {sqnr(want, got):.1f} dB')
        assert sqnr(want, got) >= least, 'the outputs are too far off'


def behind_clips(tool, tmp):
    """Activations of 4 bits behind a Clip: the optimizer of ONNX Runtime does not load a quantize node to a 4-bit type there."""
    model, data = ROOT / 'fixtures/models/digits-mobilenet.onnx', ROOT / 'fixtures/data/digits'
    held = np.load(ROOT / 'fixtures/data/digits-eval.npz')
    x = held['images'].astype(np.float32)[:, None] / 255
    want, out = session(model).run(None, {'input': x})[0], Path(tmp) / 'clipped.onnx'
    for scheme in 'w4a4', 'w4a4asym':
        subprocess.run([tool, 'quantize', str(model), '--data', str(data), '-o', str(out), '--scheme', scheme, '--target', 'onnx-qdq', '--recipe', 'best', '--progress', 'none'], check=True, stdout=subprocess.DEVNULL)
        found = [session(out, optimized).run(None, {'input': x})[0] for optimized in (True, False)]
        print(f'{scheme} behind Clip: {sqnr(want, found[0]):.1f} dB, {sqnr(want, found[1]):.1f} dB without the optimizer')
        assert min(sqnr(want, got) for got in found) > 5, 'the outputs are too far off'


def packed(tool, tmp):
    """Weights in blocks as MatMulNBits compute what their plain dequantized form does, ragged tails and zero points included, and ONNX Runtime
    fuses the latter into the former, where it has a kernel of so many bits and blocks are a power of two."""
    from onnx import TensorProto, helper, numpy_helper
    rng = np.random.default_rng(0)
    w = rng.standard_normal((72, 25)).astype(np.float32); x = rng.standard_normal((5, 72)).astype(np.float32)
    graph = helper.make_graph([helper.make_node('MatMul', ['x', 'w'], ['y'], 'product')], 'g', [helper.make_tensor_value_info('x', TensorProto.FLOAT, [None, 72])],
                              [helper.make_tensor_value_info('y', TensorProto.FLOAT, [None, 25])], [numpy_helper.from_array(w, 'w')])
    model = Path(tmp) / 'product.onnx'
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8), model)
    for scheme in ('w1a16g32', 'w2a16g16', 'w2a16g32asym', 'w3a16g32asym', 'w4a16g32', 'w4a16g64asym', 'w6a16g32', 'w8a16g32', 'w8a16g128'):
        outs = {}
        for target in ('ort-cpu', 'onnx-qdq'):
            out = Path(tmp) / f'{target}.onnx'
            subprocess.run([tool, 'quantize', str(model), '-o', str(out), '--scheme', scheme, '--target', target, '--recipe', 'fast', '--progress', 'none'], check=True, stdout=subprocess.DEVNULL)
            onnx.checker.check_model(str(out), full_check=True)
            assert (target == 'ort-cpu') == any(n.op_type == 'MatMulNBits' for n in onnx.load(str(out)).graph.node)
            newer = ONLY_FOUR_BITS and scheme[1] not in '34'
            if target == 'ort-cpu' and not newer: outs[target] = session(out).run(None, {'x': x})[0]
            if target == 'onnx-qdq':
                outs[target] = session(out, optimized=newer).run(None, {'x': x})[0]
                fused = operators(out, tmp)
                if scheme[:2] == 'w4' or (scheme in FUSED and not ONLY_FOUR_BITS):
                    assert fused['MatMulNBits'] == 1 and fused['DequantizeLinear'] == 0, f'{scheme} is not fused: {dict(fused)}'
        if newer:
            print(f'{scheme}: packed is for a newer ONNX Runtime than {ort.__version__}; plain keeps {sqnr(x @ w, outs["onnx-qdq"]):.1f} dB')
            continue
        difference = np.abs(outs['ort-cpu'] - outs['onnx-qdq']).max()
        print(f'{scheme}: packed and plain differ by {difference:.1e}, {sqnr(x @ w, outs["ort-cpu"]):.1f} dB')
        assert difference <= 1e-4, 'packing changed the weight'


def tables(tool, tmp):
    """Tables in blocks, alone and shared with a head: packed and plain agree, and one copy of the codes is in the file."""
    from onnx import TensorProto, helper, numpy_helper
    rng = np.random.default_rng(0)
    e, p = rng.standard_normal((4000, 64)).astype(np.float32), rng.standard_normal((512, 64)).astype(np.float32)
    nodes = [helper.make_node('Gather', ['e', 'i'], ['a'], 'embed'), helper.make_node('Gather', ['p', 'i'], ['b'], 'position'), helper.make_node('Add', ['a', 'b'], ['x']),
             helper.make_node('Transpose', ['e'], ['t'], 'turn', perm=[1, 0]), helper.make_node('MatMul', ['x', 't'], ['y'], 'head')]
    graph = helper.make_graph(nodes, 'g', [helper.make_tensor_value_info('i', TensorProto.INT64, [None, None])],
                              [helper.make_tensor_value_info('y', TensorProto.FLOAT, [None, None, 4000]), helper.make_tensor_value_info('x', TensorProto.FLOAT, [None, None, 64])],
                              [numpy_helper.from_array(e, 'e'), numpy_helper.from_array(p, 'p')])
    model = Path(tmp) / 'tied.onnx'
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8), model)
    i = rng.integers(0, 512, (3, 7)); want = session(model).run(None, {'i': i})
    for scheme, newer in (('w8a16g32', True), ('w4a16g16', True), ('w4a16g32asym', True), ('w2a16g16', True), ('w4a16g32', False)):
        outs = {}
        for target in ('ort-cpu', 'onnx-qdq'):
            out = Path(tmp) / f'{target}.onnx'; head = [] if newer else ['--keep-float', 'head']
            subprocess.run([tool, 'quantize', str(model), '-o', str(out), '--scheme', 'w4a16g32', '--embeddings', scheme, '--target', target, '--recipe', 'fast', '--progress', 'none', *head], check=True, stdout=subprocess.DEVNULL)
            onnx.checker.check_model(str(out), full_check=True)
            if target == 'ort-cpu' and newer and ONLY_FOUR_BITS: continue
            outs[target] = session(out, optimized=target == 'ort-cpu').run(None, {'i': i})
            if target == 'ort-cpu':
                ops, size = operators(out, tmp), out.stat().st_size
                assert ops['GatherBlockQuantized'] == 2 and ops['MatMulNBits'] == newer and ops['Reshape'] == ops['DequantizeLinear'] == 0, ops
                assert not newer or size < (4000 + 512) * 64 * (int(scheme[1]) / 8 + 4 / int(scheme[6:8]) + 1 / 16) + 5000, 'the table is there twice'
        print(f'tables in {scheme}: ' + (f'packed is for a newer ONNX Runtime than {ort.__version__}' if len(outs) < 2 else f'{sqnr(want[0], outs["ort-cpu"][0]):.1f} dB'))
        if len(outs) == 2: assert all(np.abs(a - b).max() <= 2e-4 for a, b in zip(*outs.values())), 'packing changed a table'


def dynamic(tool, tmp):
    """Ranges chosen by each run: ONNX Runtime fuses the products, and optimized and plain agree within a step."""
    model = ROOT / 'fixtures/models/digits-resnet.onnx'
    held = np.load(ROOT / 'fixtures/data/digits-eval.npz')
    x = held['images'].astype(np.float32)[:, None] / 255
    want = session(model).run(None, {'input': x})[0]
    for target in ('ort-cpu', 'onnx-qdq'):
        out = Path(tmp) / 'dynamic.onnx'
        subprocess.run([tool, 'quantize', str(model), '-o', str(out), '--scheme', 'w8a8dyn', '--target', target, '--progress', 'none'], check=True, stdout=subprocess.DEVNULL)
        onnx.checker.check_model(str(out), full_check=True)
        plain, fused = (session(out, optimized).run(None, {'input': x})[0] for optimized in (False, True))
        ops = operators(out, tmp)
        print(f'w8a8dyn for {target}: {sqnr(want, plain):.1f} dB, fused {sqnr(plain, fused):.1f} dB from that; {dict(ops)}')
        assert ops['DynamicQuantizeMatMul'] == 1 and ops['MatMulInteger'] == ops['Gemm'] == 0, 'the product is not fused'
        assert sqnr(want, plain) >= 40 and sqnr(plain, fused) >= (45 if SATURATES else 55), 'the outputs are too far off'


def tokens(tool, tmp):
    """Ranges of every token, computed by nodes: each runtime gets the numbers that the scheme says, and outliers do not drown the rest. Optimized, ONNX Runtime 1.31
    makes MatMulNBits of the products and rounds what 8-bit weights read once more, which costs decibels at 8 bits."""
    from onnx import TensorProto, helper, numpy_helper
    rng = np.random.default_rng(1)
    ws = [(rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32) for shape in ((48, 96), (96, 20))]
    graph = helper.make_graph([helper.make_node('MatMul', ['x', 'w0'], ['h'], 'first'), helper.make_node('Tanh', ['h'], ['t']), helper.make_node('MatMul', ['t', 'w1'], ['y'], 'second')], 'g',
                              [helper.make_tensor_value_info('x', TensorProto.FLOAT, ['batch', 'words', 48])], [helper.make_tensor_value_info('y', TensorProto.FLOAT, ['batch', 'words', 20])],
                              [numpy_helper.from_array(w, f'w{i}') for i, w in enumerate(ws)])
    model, data = Path(tmp) / 'words.onnx', Path(tmp) / 'words'
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8), model); data.mkdir()
    loud = np.where(np.arange(48) == 5, 30, 1).astype(np.float32)
    draw = lambda n: (rng.standard_normal((n, 16, 48)) * np.exp(rng.standard_normal((n, 16, 1))) * loud).astype(np.float32)
    np.savez(data / 'calib.npz', x=draw(64)); x = draw(32); x[0, 0] = 0
    want = session(model).run(None, {'x': x})[0]
    for scheme, least in (('w8a8tok', 28), ('w4a6tok', 12), ('w4a4tok', 14), ('wfp8afp8tok', 24), ('wfp4ae3m2tok', 12), ('w4ae2m3tok', 12)):
        if ('afp' in scheme or 'ae' in scheme) and ONLY_FOUR_BITS: continue  # ONNX Runtime 1.22 quantizes no 8-bit floats by computed scales
        out = Path(tmp) / 'tokens.onnx'
        said = subprocess.run([tool, 'quantize', str(model), '--data', str(data), '-o', str(out), '--scheme', scheme, '--target', 'onnx-qdq', '--recipe', 'best', '--progress', 'none', '--json'], check=True, capture_output=True, text=True).stdout
        assert json.loads(said)['verify']['passed'], said
        onnx.checker.check_model(str(out), full_check=True)
        plain, fused = (session(out, optimized).run(None, {'x': x})[0] for optimized in (False, True))
        print(f'{scheme}: {sqnr(want, plain):.1f} dB, {sqnr(want, fused):.1f} dB optimized')
        assert min(sqnr(want, plain), sqnr(want, fused)) >= least, 'the outputs are too far off'
        assert np.abs(plain[0, 0] - want[0, 0]).max() < 1e-4, 'a token of zeros is not zero'


def control_flow(tool, tmp):
    source, out = ROOT / 'fixtures/passes/drop-dead/captured.oq', Path(tmp) / 'if.onnx'
    subprocess.run([tool, 'cat', str(source), '--to', 'onnx', '-o', str(out)], check=True)
    again = Path(tmp) / 'if2.onnx'
    subprocess.run([tool, 'opt', str(out), '--pipeline', 'infer-shapes, fold-constants, drop-dead', '-o', str(again), '--progress', 'none'], check=True)
    for c in (True, False):
        x = np.array([-1, 2], np.float32)
        a, b = (session(m).run(None, {'x': x, 'c': np.array(c)})[0] for m in (out, again))
        want = np.tanh(x) if c else -np.tanh(x)
        assert np.array_equal(a, b) and np.allclose(a, want, atol=1e-6), (c, a, b, want)
    print('If: both branches run, unchanged')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); o = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        for name in ('digits-resnet', 'digits-mobilenet'): digits(o.tool, name, tmp)
        formats(o.tool, tmp)
        behind_clips(o.tool, tmp)
        halves(o.tool, tmp)
        packed(o.tool, tmp)
        tables(o.tool, tmp)
        dynamic(o.tool, tmp)
        tokens(o.tool, tmp)
        control_flow(o.tool, tmp)


if __name__ == '__main__':
    sys.exit(main())
