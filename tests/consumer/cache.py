#!/usr/bin/env python3
"""Decoders whose caches are codes: ONNX Runtime generates with them, token after token.

    cache.py --tool target/release/onnx-quant [--zoo ../shared/zoo --smollm2 DIR]

A small decoder of random weights shows what has to be exact: what a run computes from past codes is what the float-cache model computes
from the numbers that these codes stand for; without a past there is no error at all; codes in the cache stay as they are; sequences that
trade places trade caches. With samples, caches of 4 bits are smoothed first. With --smollm2, the folder of the zoo's language model, its graph gets a cache, and the table shows what caches
of 8 and of 4 bits cost its predictions, told the right text token by token, and how much memory a token takes.
"""
import argparse, shutil, subprocess, sys, tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as T, helper as h, numpy_helper as nh


def tiny(layers=2, heads=2, size=16, words=50, seed=7):
    """A decoder with caches: attention and a gated product per layer, root mean squares as norms, positions learned by nobody."""
    r, d = np.random.default_rng(seed), heads * size
    nodes, weights, inputs, outputs = [], [], [h.make_tensor_value_info('ids', T.INT64, ['batch', 'seq'])], [h.make_tensor_value_info('logits', T.FLOAT, ['batch', 'seq', words])]

    def const(name, array): weights.append(nh.from_array(np.asarray(array), name)); return name
    def weight(name, *shape): return const(name, (r.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32))

    def op(kind, ins, out, **attrs):
        out = out if isinstance(out, list) else [out]
        nodes.append(h.make_node(kind, ins, out, name=f'n{len(nodes)}', **attrs)); return out[0]

    def norm(x, name):
        square = op('Mul', [x, x], f'{name}.square'); mean = op('ReduceMean', [square, const(f'{name}.axes', np.array([-1]))], f'{name}.mean', keepdims=1)
        root = op('Sqrt', [op('Add', [mean, const(f'{name}.eps', np.float32(1e-5))], f'{name}.shifted')], f'{name}.root')
        return op('Div', [x, root], f'{name}.normed')

    x = op('Gather', [weight('table', words, d), 'ids'], 'embedded')
    split, turned = const('split', np.array([0, 0, heads, size])), [0, 2, 1, 3]
    for l in range(layers):
        n, new = norm(x, f'l{l}.n1'), {}
        for what in 'qkv': new[what] = op('Transpose', [op('Reshape', [op('MatMul', [n, weight(f'l{l}.{what}', d, d)], f'l{l}.{what}.all'), split], f'l{l}.{what}.split')], f'l{l}.{what}.heads', perm=turned)
        for what, name in (('k', 'key'), ('v', 'value')):
            past, present = f'past_key_values.{l}.{name}', f'present.{l}.{name}'
            inputs.append(h.make_tensor_value_info(past, T.FLOAT, ['batch', heads, 'past', size])); outputs.append(h.make_tensor_value_info(present, T.FLOAT, ['batch', heads, 'total', size]))
            new[what] = op('Concat', [past, new[what]], present, axis=2)
        if l == 0:  # which keys a query may see
            total = op('Shape', [new['k']], 'shape.total', start=2, end=3); past = op('Shape', ['past_key_values.0.key'], 'shape.past', start=2, end=3)
            one, zero = const('one', np.array(1)), const('zero', np.array(0)); axis = const('axis', np.array([0])); last = const('last', np.array([1]))
            end, begin = op('Squeeze', [total, axis], 'end'), op('Squeeze', [past, axis], 'begin')
            later = op('Greater', [op('Unsqueeze', [op('Range', [zero, end, one], 'keys'), axis], 'keys.row'), op('Unsqueeze', [op('Range', [begin, end, one], 'queries'), last], 'queries.column')], 'later')
            mask = op('Where', [later, const('never', np.float32(-1e9)), const('now', np.float32(0))], 'mask')
        scores = op('MatMul', [new['q'], op('Transpose', [new['k']], f'l{l}.k.turned', perm=[0, 1, 3, 2])], f'l{l}.scores')
        scores = op('Add', [op('Mul', [scores, const(f'l{l}.scale', np.float32(size ** -0.5 * 4))], f'l{l}.scaled'), mask], f'l{l}.masked')
        seen = op('Transpose', [op('MatMul', [op('Softmax', [scores], f'l{l}.shares', axis=-1), new['v']], f'l{l}.seen')], f'l{l}.seen.turned', perm=turned)
        out = op('MatMul', [op('Reshape', [seen, const(f'l{l}.join', np.array([0, 0, d]))], f'l{l}.joined'), weight(f'l{l}.o', d, d)], f'l{l}.out')
        x = op('Add', [x, out], f'l{l}.x1')
        n = norm(x, f'l{l}.n2'); gate = op('MatMul', [n, weight(f'l{l}.gate', d, 2 * d)], f'l{l}.gated')
        x = op('Add', [x, op('MatMul', [op('Mul', [gate, op('Sigmoid', [gate], f'l{l}.sigmoid')], f'l{l}.silu'), weight(f'l{l}.down', 2 * d, d)], f'l{l}.mlp')], f'l{l}.x2')
    op('MatMul', [norm(x, 'final'), weight('head', d, words)], 'logits')
    return h.make_model(h.make_graph(nodes, 'decoder', inputs, outputs, weights), opset_imports=[h.make_opsetid('', 21)], ir_version=10)


def with_cache(path, out):
    """The zoo's language model with its keys and values in caches; weights stay where they are, which must be beside `out`."""
    m = onnx.load(str(path), load_external_data=False); g = m.graph
    by_output = {o: n for n in g.node for o in n.output}
    readers = {}
    for n in g.node:
        for i in n.input: readers.setdefault(i, []).append(n)
    def const(name, array): g.initializer.append(nh.from_array(np.asarray(array), name)); return name
    zero, one, axis, last = const('c.zero', np.array(0)), const('c.one', np.array(1)), const('c.axis', np.array([0])), const('c.last', np.array([1]))
    softmaxes = [n for n in g.node if n.op_type == 'Softmax']
    new, shapes, heads, size = {}, set(), None, None
    for l, softmax in enumerate(softmaxes):
        masked = by_output[softmax.input[0]]; scores = by_output[by_output[masked.input[0]].input[0]]
        masked.input[1] = 'c.mask'
        ends = {'key': by_output[by_output[scores.input[1]].input[0]], 'value': by_output[next(r for r in readers[softmax.output[0]] if r.op_type == 'MatMul').input[1]]}
        for what, reshape in ends.items():
            expand = by_output[reshape.input[0]]; unsqueeze = by_output[expand.input[0]]
            shapes |= {expand.input[1], reshape.input[1]}
            past, present = f'past_key_values.{l}.{what}', f'present.{l}.{what}'
            new[unsqueeze.name] = h.make_node('Concat', [past, unsqueeze.input[0]], [present], name=f'c.{present}', axis=2)
            unsqueeze.input[0] = present
            g.input.append(h.make_tensor_value_info(past, T.FLOAT, ['batch', 3, 'past', 64])); g.output.append(h.make_tensor_value_info(present, T.FLOAT, ['batch', 3, 'total', 64]))
    for name in shapes:
        for i, part in enumerate(by_output[name].input):
            if part == 'val_1': by_output[name].input[i] = 'c.total'
    first = [h.make_node('Shape', ['past_key_values.0.key'], ['c.past'], name='c.past', start=2, end=3), h.make_node('Add', ['c.past', 'val_1'], ['c.total'], name='c.total'),
             h.make_node('Squeeze', ['c.past', axis], ['c.begin'], name='c.begin'), h.make_node('Squeeze', ['c.total', axis], ['c.end'], name='c.end'),
             h.make_node('Range', [zero, 'c.end', one], ['c.keys'], name='c.keys'), h.make_node('Range', ['c.begin', 'c.end', one], ['c.queries'], name='c.queries'),
             h.make_node('Unsqueeze', ['c.queries', last], ['c.column'], name='c.column'), h.make_node('LessOrEqual', ['c.keys', 'c.column'], ['c.sees'], name='c.sees'),
             h.make_node('Where', ['c.sees', const('c.now', np.float32(0)), const('c.never', np.float32(-3.4e38))], ['c.mask'], name='c.mask'), h.make_node('Cast', ['c.begin'], ['c.start'], name='c.start', to=T.FLOAT)]
    nodes, placed = [], False
    for n in g.node:
        if n.name in new: nodes.append(new[n.name])
        if n.name == 'node_mul': n.input[0] = 'c.positions'; nodes.append(h.make_node('Add', ['_to_copy', 'c.start'], ['c.positions'], name='c.positions'))
        nodes.append(n)
        if 'val_1' in n.output and not placed: nodes += first; placed = True
    del g.node[:]; g.node.extend(nodes)
    del g.value_info[:]
    onnx.save(m, str(out))


class Decoder:
    """Runs a model with caches, in floats or in codes."""

    def __init__(self, path):
        o = ort.SessionOptions(); o.log_severity_level = 3
        self.session = ort.InferenceSession(str(path), o, providers=['CPUExecutionProvider'])
        self.ids, *self.past = self.session.get_inputs()
        self.present = [o.name for o in self.session.get_outputs()][1:]
        assert len(self.past) == len(self.present), 'every input of a cache has its output'

    def empty(self, batch=1):
        kinds = {'tensor(float)': np.float32, 'tensor(uint8)': np.uint8}
        return [np.zeros([batch, i.shape[1], 0, i.shape[3]], kinds[i.type]) for i in self.past]

    def __call__(self, ids, past):
        logits, *present = self.session.run(None, {self.ids.name: np.asarray(ids, np.int64), **{i.name: p for i, p in zip(self.past, past)}})
        return logits, present


def decoded(cache, size):
    """The numbers that a cache in codes stands for, in the order of a float one."""
    out = []
    for codes, scale, zero in zip(cache[0::3], cache[1::3], cache[2::3]):
        if codes.shape[-1] < size: codes = np.concatenate([codes & 15, codes >> 4], -1)
        out.append((codes.astype(np.float32) - zero.astype(np.float32)) * scale)
    return out


def samples(folder, name, ids, past):
    """Samples without a past: `ids`, row by row, and caches of no tokens."""
    folder.mkdir()
    for at, row in enumerate(ids): np.savez(folder / f'{at}.npz', **{name: row[None], **{i.name: np.zeros([1, i.shape[1], 0, i.shape[3]], np.float32) for i in past}})
    return folder


def quantize(tool, model, out, *options):
    subprocess.run([tool, 'quantize', str(model), '-o', str(out), '--recipe', 'fast', '--progress', 'none', *options], check=True, stdout=subprocess.DEVNULL)


def exact(tool, tmp, target):
    # ONNX Runtime 1.22 computes MatMulNBits in float for 4 bits only.
    old = tuple(map(int, ort.__version__.split('.')[:2])) <= (1, 22); scheme = 'w4a16g32' if old else 'w8a16g32'
    model = Path(tmp) / 'tiny.onnx'; onnx.save(tiny(), str(model))
    plain = Path(tmp) / 'plain.onnx'; quantize(tool, model, plain, '--scheme', scheme, '--target', target)
    rng = np.random.default_rng(3); ids = rng.integers(0, 50, (2, 24))
    float_cache = Decoder(plain); data = samples(Path(tmp) / f'{target}.samples', 'ids', rng.integers(0, 50, (16, 32)), float_cache.past)
    for bits, options in ((8, []), (4, []), (4, ['--data', str(data)])):
        out = Path(tmp) / f'cache{bits}.onnx'; quantize(tool, model, out, '--scheme', scheme, '--target', target, '--cache', str(bits), *options)
        onnx.checker.check_model(str(out), full_check=True)
        coded = Decoder(out); past, worst = coded.empty(2), 0.0
        assert all(p.dtype == np.uint8 for p in past[0::3]) and past[0].shape[-1] == 16 * bits // 8
        want, _ = float_cache(ids[:, :9], float_cache.empty(2)); got, past = coded(ids[:, :9], past)
        first = np.abs(want - got).max(); assert first < 1e-4, f'{first}: without a past nothing is rounded'
        for at in range(9, 24):
            got, present = coded(ids[:, at:at + 1], past)
            if not options: worst = max(worst, np.abs(float_cache(ids[:, at:at + 1], decoded(past, 16))[0] - got).max())
            assert all((p == q[:, :, :at]).all() for p, q in zip(past, present)), 'codes in the cache changed'
            turned, other = coded(ids[::-1, at:at + 1], [p[::-1] for p in past])
            assert all((p[::-1] == q).all() for p, q in zip(present, other)), 'sequences that trade places do not trade caches'
            past = present
        whole, _ = float_cache(ids, float_cache.empty(2))
        error = np.square(whole[:, -1:] - got).sum() / np.square(whole[:, -1:]).sum()
        exactly = 'smoothed' if options else f'{worst:.1e} from the float cache of the same numbers'
        print(f'{target}, cache of {bits} bits: {exactly}; after 24 tokens {-10 * np.log10(error):.1f} dB')
        assert worst < 1e-3, 'it computes something else than its codes say'
        back = Path(tmp) / 'back.onnx'; subprocess.run([tool, 'convert', str(out), '-o', str(back), '--target', target], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        again, _ = Decoder(back)(ids[:, :1], past); once, _ = coded(ids[:, :1], past)
        assert np.abs(again - once).max() < 1e-5, 'converted to itself it is another model'


def language(tool, tmp, zoo, folder):
    sys.path.insert(0, str(zoo)); import zoo as z
    model = Path(tmp) / 'lm.onnx'; with_cache(Path(folder) / 'smollm2-135m.onnx', model)
    shutil.copy(Path(folder) / 'smollm2-135m.onnx.data', tmp)  # ONNX Runtime follows no links
    ids = z.lm_feed(z.texts()['eval'])['input_ids'][:8, :192]
    reference = ort.InferenceSession(str(Path(folder) / 'smollm2-135m.onnx'), providers=['CPUExecutionProvider'])
    prompt, want = 64, np.concatenate([reference.run(None, {'input_ids': row[None]})[0] for row in ids])[:, 64:]
    soft = lambda x: np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)
    p = soft(want.astype(np.float64))
    print('\n| cache | divergence per token | same first choice | bytes per token |\n|---|---|---|---|')
    data = samples(Path(tmp) / 'samples', 'input_ids', z.lm_feed(z.texts()['calib'])['input_ids'][:16], Decoder(model).past)
    for what, bits, options in (('32 bits', 32, []), ('8 bits', 8, []), ('4 bits', 4, []), ('4 bits, smoothed', 4, ['--data', str(data)])):
        path = model
        if bits < 32: path = Path(tmp) / 'coded.onnx'; quantize(tool, model, path, '--keep-float', '*', '--target', 'onnx-qdq', '--scheme', 'w8a16', '--cache', str(bits), *options)
        decoder = Decoder(path); _, past = decoder(ids[:, :prompt], decoder.empty(len(ids))); got = []
        for at in range(prompt, ids.shape[1]):
            logits, past = decoder(ids[:, at:at + 1], past); got.append(logits)
        q = soft(np.concatenate(got, 1).astype(np.float64))
        kl = (p * (np.log(p + 1e-30) - np.log(q + 1e-30))).sum(-1).mean()
        per_token = sum(c.nbytes for c in past) / past[0].shape[0] / past[0].shape[2]
        print(f'| {what} | {kl:.5f} | {(p.argmax(-1) == q.argmax(-1)).mean():.4f} | {per_token:.0f} |')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo'); p.add_argument('--smollm2'); o = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        for target in ('onnx-qdq', 'ort-cpu'): exact(o.tool, tmp, target)
        if o.smollm2: language(o.tool, tmp, Path(o.zoo).resolve(), o.smollm2)
        else: print('the language model is skipped: no --smollm2')


if __name__ == '__main__': main()
