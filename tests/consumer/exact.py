#!/usr/bin/env python3
"""Equalization leaves the function of every model of the zoo as it is, or as it is for the samples: ONNX Runtime's outputs before and after, in float.

    exact.py --tool target/release/onnx-quant --zoo ../shared/zoo [--only NAME] [--lm DIR]

Each pass runs alone, on 64 samples, and nothing is quantized. Checked on four files of samples, which are among these, for every output: the largest difference is at
most 1e-5 of the largest value (float sums are reassociated), or no more than twice what ONNX Runtime's own optimizer changes in the
float model where that is more. Prints what each pass did to how many nodes.
"""
import argparse, glob, json, subprocess, sys, tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

from zoo import MODELS

PASSES = [('smooth', 'w8a8'), ('equalize-layers', 'w4a8'), ('equalize-layers{clamps=1}', 'w4a8'), ('relax-clamps', 'w8a8'), ('absorb-high-bias', 'w8a8'), ('reparameterize-norms{strength=1}', 'w8a8'), ('awq', 'w4a16g32'), ('learn-scaling{sweeps=1}', 'w4a16g32'), ('learn-scaling{sweeps=1}', 'w4a4'), ('rotate', 'w4a16g32'), ('learn-rotation{sweeps=1}', 'w4a16g32'), ('rotate-heads', 'w4a16g32'), ('rotate-bottlenecks', 'w4a8'), ('rotate-inputs', 'w4a4'), ('reparameterize-norms{to=bare}', 'w4a4'), ('defer-softmax', 'w4a4')]
PLAIN = 'infer-shapes, absorb-qdq, fold-constants, *(eliminate-identity, fold-gemm-scalars, fold-batch-norm, fold-affine, fold-pad, fold-constants, infer-shapes, drop-dead)'


def outputs(path, feeds, optimized=False):
    o = ort.SessionOptions(); o.log_severity_level = 3
    if not optimized: o.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    s = ort.InferenceSession(str(path), o, providers=['CPUExecutionProvider'])
    return [s.run(None, f) for f in feeds]


def distance(a, b):
    return max(float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30)) for p, q in zip(a, b) for x, y in zip(p, q))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo', required=True); p.add_argument('--only'); p.add_argument('--lm'); o = p.parse_args()
    zoo = Path(o.zoo).resolve(); failed = []
    models = {name: zoo / 'models' / file for name, (file, _) in MODELS.items()}
    if o.lm: models['smollm2'] = Path(o.lm) / 'smollm2-135m.onnx'
    for name, model in models.items():
        if o.only and name != o.only: continue
        with tempfile.TemporaryDirectory() as tmp:
            data, out, plain = (Path(tmp) / n for n in ('feeds', 'after.onnx', 'before.onnx'))
            subprocess.run([sys.executable, zoo / 'zoo.py', 'feeds', name, '--out', data], check=True, stdout=subprocess.DEVNULL)
            feeds = [dict(np.load(f)) for f in sorted(glob.glob(str(data / '*.npz')))[:4]]
            run = lambda text, to, scheme: json.loads(subprocess.run([o.tool, 'quantize', str(model), '--data', str(data), '--samples', '64', '--scheme', scheme, '--pipeline', text, '-o', str(to), '--progress', 'none', '--json'], check=True, capture_output=True, text=True).stdout)
            run(PLAIN, plain, 'w8a8')
            want = outputs(plain, feeds); allowed = max(1e-5, 2 * distance(want, outputs(plain, feeds, True)))
            for step, scheme in PASSES:
                run(f'{PLAIN}, calibrate, {step}, drop-dead', out, scheme)
                d = distance(want, outputs(out, feeds)); ok = d <= allowed
                print(f"{'ok  ' if ok else 'MISS'} {name:20s} {step:34s} largest difference {d:.1e} of {allowed:.1e}{'' if out.read_bytes() != plain.read_bytes() else ' (found nothing to do)'}", flush=True)
                if not ok: failed.append(f'{name} {step}')
    if failed: sys.exit(f'the function changed: {", ".join(failed)}')


if __name__ == '__main__':
    main()
