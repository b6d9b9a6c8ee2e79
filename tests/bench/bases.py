#!/usr/bin/env python3
"""How much of a figure is chance: one scheme in several bases, which differ by nothing but random signs.

    bases.py --tool target/release/onnx-quant --zoo ../shared/zoo [--schemes w4a8,w4a8asym] [--bases 4] [--extra OPTIONS...]

efficientnet-lite0 for `onnx-qdq` by the pipeline of `best` for 8-bit activations, with seeds 0, 1, ... of `rotate-bottlenecks`, scored by the
zoo; a line per scheme with every figure and the mean.
"""
import argparse, json, subprocess, sys, tempfile
from pathlib import Path

NAME = 'efficientnet-lite0'
PIPELINE = '''infer-shapes, expand-qoperators, absorb-qdq, fold-constants,
*(eliminate-identity, fold-gemm-scalars, fold-batch-norm, fold-affine, fold-pad, fold-constants, infer-shapes, drop-dead),
calibrate, smooth, equalize-layers, rotate-bottlenecks{seed=SEED}, infer-shapes, drop-dead,
calibrate, assign-encodings{observer=mse, products=min-max, weights=mse, least-db=31},
round-in-order{method=enumerate, refit=3}, correct-bias'''


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo', required=True); p.add_argument('--schemes', default='w4a8,w4a8asym')
    p.add_argument('--bases', type=int, default=4); p.add_argument('--extra', nargs=argparse.REMAINDER, default=[]); o = p.parse_args()
    zoo = Path(o.zoo).resolve(); print('| scheme | dB | mean | agrees with float | mean |\n|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as tmp:
        feeds, out = Path(tmp) / 'feeds', Path(tmp) / 'q.onnx'
        subprocess.run([sys.executable, zoo / 'zoo.py', 'feeds', NAME, '--out', feeds], check=True, stdout=subprocess.DEVNULL)
        for scheme in o.schemes.split(','):
            scores = []
            for seed in range(o.bases):
                command = [o.tool, 'quantize', zoo / 'models' / f'{NAME}.onnx', '--data', feeds, '-o', out, '--target', 'onnx-qdq', '--scheme', scheme, '--progress', 'none']
                subprocess.run([*command, '--pipeline', PIPELINE.replace('SEED', str(seed)), *o.extra], check=True, stdout=subprocess.DEVNULL)
                scores.append(json.loads(subprocess.run([sys.executable, zoo / 'zoo.py', 'score', NAME, out, '--json'], check=True, capture_output=True, text=True).stdout))
            columns = [[score[key] for score in scores] for key in ('output_sqnr_db', 'agree_with_float')]
            cells = [f'{", ".join(f"{v:.{n}f}" for v in column)} | {sum(column) / len(column):.{n}f}' for column, n in zip(columns, (2, 3))]
            print(f'| {scheme} | {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
    main()
