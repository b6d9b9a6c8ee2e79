#!/usr/bin/env python3
"""Runs ONNX's own operator tests and small models through import and export, and compares results in ONNX Runtime.

    conformance.py --tool target/release/onnx-quant [--data DIR] [--list tests/conformance/known.json] [--write]

DIR is `onnx/backend/test/data` of the onnx 1.19.1 wheel (1,615 node tests; later wheels ship none). Every model goes
through `onnx-quant opt --pipeline ""`; ONNX Runtime runs the model before and after, graph optimization off, on the same inputs
(the test's, or ones made from the declared shapes). A case passes when the outputs are bit-equal (NaN equals NaN). A case that ONNX
Runtime cannot run, or that Python cannot feed, passes as `structure` when it comes out node by node the same; otherwise it is skipped and counted. A case that differs or is refused must be in the list, with a reason;
one in the list that passes fails the run too, so that the list stays true.
"""
import argparse, collections, concurrent.futures, json, subprocess, sys, tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

ort.set_default_logger_severity(4)


def session(path):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def load_value(path, kind):
    data = path.read_bytes()
    if kind == 'sequence_type':
        s = onnx.SequenceProto(); s.ParseFromString(data); return numpy_helper.to_list(s)
    if kind == 'optional_type':
        o = onnx.OptionalProto(); o.ParseFromString(data); return numpy_helper.to_optional(o)
    t = onnx.TensorProto(); t.ParseFromString(data)
    if t.data_type in (onnx.TensorProto.BFLOAT16, *range(17, 29)):
        raise ValueError('an element type that NumPy does not have')
    return numpy_helper.to_array(t)


def feeds_of(folder, model, graph_inputs):
    data = folder / 'test_data_set_0'
    if data.is_dir():
        infos = {i.name: i.type.WhichOneof('value') for i in model.graph.input}
        names = [i.name for i in model.graph.input]
        return {n: load_value(data / f'input_{k}.pb', infos[n]) for k, n in enumerate(names) if (data / f'input_{k}.pb').exists()}
    rng = np.random.default_rng(0)
    types = {'tensor(float)': np.float32, 'tensor(int64)': np.int64, 'tensor(int32)': np.int32}
    return {i.name: rng.standard_normal([d if isinstance(d, int) else 1 for d in i.shape]).astype(types[i.type]) for i in graph_inputs}


def same(a, b):
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if a is None or b is None:
        return a is b
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(np.array_equal(a, b, equal_nan=a.dtype.kind in 'fc'))


def same_structure(a, b):
    """Whether both have the same nodes, node by node, and the same inputs and outputs: then nothing was changed that a run could show."""
    node = lambda n: (n.op_type, n.domain if n.domain != 'ai.onnx' else '', list(n.input), list(n.output), sorted(x.SerializeToString(deterministic=True) for x in n.attribute if x.type != onnx.AttributeProto.TENSOR), sorted((x.name, numpy_bytes(x.t)) for x in n.attribute if x.type == onnx.AttributeProto.TENSOR))
    trim = lambda names: names[:len(names) - next((i for i, n in enumerate(reversed(names)) if n), len(names))]
    key = lambda m: [(o, d, trim(i), trim(u), x, t) for o, d, i, u, x, t in map(node, (n for n in m.graph.node if n.op_type != 'Constant'))]
    ends = lambda vs: [(v.name, v.type.tensor_type.elem_type) for v in vs]
    return key(a) == key(b) and ends(a.graph.output) == ends(b.graph.output)


def numpy_bytes(tensor):
    return numpy_helper.to_array(tensor).tobytes(), tensor.data_type, tuple(tensor.dims)


RANDOM = {'RandomNormal', 'RandomNormalLike', 'RandomUniform', 'RandomUniformLike', 'Bernoulli', 'Multinomial'}


def case(tool, folder):
    """(verdict, reason): pass, skip, refused, differs or broken."""
    path = folder if folder.suffix == '.onnx' else folder / 'model.onnx'
    folder = path.parent
    model = onnx.load(str(path), load_external_data=False)
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / 'model.onnx'
        run = subprocess.run([tool, 'opt', str(path), '--pipeline', '', '-o', str(out), '--progress', 'none'], capture_output=True, text=True, timeout=120)
        if run.returncode == 101 or run.returncode < 0:
            return 'broken', f'exit {run.returncode}: {run.stderr[-300:]}'
        if run.returncode != 0:
            return 'refused', ((run.stderr or run.stdout).strip().splitlines() or ['no message'])[0][:200]
        try:
            before = session(path)
            feeds = feeds_of(folder, model, before.get_inputs())
            want = before.run(None, feeds)
        except Exception as error:
            why = str(error).splitlines()[0][:60]
            return ('structure', '') if same_structure(model, onnx.load(str(out))) else ('skip', f'not run ({why}) and not node by node the same')
        try:
            after = session(out)
            got = after.run(None, {k: v for k, v in feeds.items() if k in {i.name for i in after.get_inputs()}})
        except Exception as error:
            return 'differs', 'ONNX Runtime cannot run the result: ' + str(error).splitlines()[0][:300]
        if [o.name for o in before.get_outputs()] != [o.name for o in after.get_outputs()]:
            return 'differs', 'the outputs have other names'
        if any(n.op_type in RANDOM for n in model.graph.node) and not any(a.name == 'seed' for n in model.graph.node for a in n.attribute):
            ok = all(np.shape(a) == np.shape(b) for a, b in zip(want, got))
        else:
            ok = same(want, got)
        return ('pass', '') if ok else ('differs', 'other results')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--data', required=True)
    p.add_argument('--list', default=str(Path(__file__).with_name('known.json'))); p.add_argument('--write', action='store_true'); p.add_argument('--only', default='')
    o = p.parse_args()
    known = json.loads(Path(o.list).read_text()) if Path(o.list).exists() else {}
    data = Path(o.data)
    folders = sorted(f for kind in ('node', 'light', 'simple') for f in (data / kind).glob('*') if (f / 'model.onnx').exists() or f.suffix == '.onnx')
    folders = [f for f in folders if o.only in str(f)]
    verdicts = {}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for folder, (verdict, reason) in zip(folders, pool.map(lambda f: case(o.tool, f), folders)):
            verdicts[f'{folder.parent.name}/{folder.name}'] = (verdict, reason)
    counts = collections.Counter(v for v, _ in verdicts.values())
    bad = {n: [v, r] for n, (v, r) in verdicts.items() if v in ('refused', 'differs', 'broken')}
    print(f'{len(verdicts)} models: ' + ', '.join(f'{counts[k]} {k}' for k in ('pass', 'structure', 'skip', 'refused', 'differs', 'broken')))
    for name, (v, r) in verdicts.items():
        if v == 'skip': print(f'  skipped {name}: {r}')
    if o.write:
        Path(o.list).write_text(json.dumps({n: {'verdict': v, 'reason': known.get(n, {}).get('reason', r)} for n, (v, r) in sorted(bad.items())}, indent=1) + '\n')
    fresh = {n: v for n, v in bad.items() if n not in known and not o.write}
    stale = [n for n in known if n in verdicts and verdicts[n][0] == 'pass' and not o.write]
    for n, (v, r) in list(fresh.items())[:60]: print(f'  {v} {n}: {r}')
    for n in stale: print(f'  passes but is listed: {n}')
    failed = len(fresh) + len(stale)
    print(f'{len(verdicts) - failed} passed, {failed} failed')
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
