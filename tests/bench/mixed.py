#!/usr/bin/env python3
"""What budgets for bits and for loss buy, more samples made out of few, and tables in blocks: scores on the zoo, one line per run.

    mixed.py --tool target/release/onnx-quant --zoo ../shared/zoo [--only NAME]
"""
import argparse, json, subprocess, sys, tempfile, time
from pathlib import Path

FILES = {'digits-resnet': 'digits-resnet.onnx', 'digits-mobilenet': 'digits-mobilenet.onnx', 'efficientnet-lite0': 'efficientnet-lite0.onnx', 'minilm': 'minilm-l6.onnx'}
RUNS = [('digits-resnet', '--scheme w4a8'), ('digits-resnet', '--scheme w4a8 --budget 5'),
        *(('efficientnet-lite0', f'--scheme w4a8 --recipe best{b}') for b in ('', ' --budget 5', ' --budget 5.5', ' --budget 6')),
        *((name, f'--scheme {scheme} --recipe best --budget 5 --sensitivity {s}')
          for name, scheme in (('digits-mobilenet', 'w4a8'), ('efficientnet-lite0', 'w4a8'), ('minilm', 'w4a16g32')) for s in ('error', 'kl-top', 'fisher', 'tacq', 'gradient-l1')),
        ('efficientnet-lite0', '--scheme w4a8 --recipe best --augment 1'),
        *(('efficientnet-lite0', f'--scheme {s} --target onnx-qdq --recipe best{v}') for s in ('w4a8', 'w4a4') for v in ('', ' --views 1', ' --views 3')),
        *(('efficientnet-lite0', f'--scheme {o} --target onnx-qdq --recipe best') for o in ('w4a8asym', 'w4a4asym', 'w4a4asym --views 1', 'w4a4asym --views 3')),
        *(('efficientnet-lite0', f'--scheme w8a8{d}') for d in ('', ' --max-drop 1%', ' --max-drop 0.5%')),
        *(('minilm', f'--scheme w4a16g32 --recipe best{b}') for b in ('', ' --budget 5')),
        *(('minilm', f'--scheme {s} --recipe best --augment {n}') for s in ('w4a16g32', 'w4a16g32asym', 'w3a16g64') for n in (0, 4, 8, 12)),
        *(('minilm', f'--scheme {s} --target onnx-qdq --recipe best --augment {n}') for s in ('w4a4asym', 'w4a4tok', 'w4a4asymtok') for n in (0, 4)),
        *(('minilm', f'--scheme w8a8dyn{e}') for e in ('', ' --recipe best', ' --embeddings w8a16g32', ' --embeddings w4a16g32asym', ' --embeddings w4a16g32'))]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo', required=True); p.add_argument('--only'); o = p.parse_args()
    zoo = Path(o.zoo).resolve(); print('| model | options | score | seconds |\n|---|---|---|---|')
    with tempfile.TemporaryDirectory() as tmp:
        for name, options in RUNS:
            if o.only and name != o.only: continue
            feeds, out = Path(tmp) / f'{name}.feeds', Path(tmp) / f'{name}.onnx'
            if not feeds.exists(): subprocess.run([sys.executable, zoo / 'zoo.py', 'feeds', name, '--out', feeds], check=True, stdout=subprocess.DEVNULL)
            start = time.perf_counter()
            subprocess.run([o.tool, 'quantize', zoo / 'models' / FILES[name], '--data', feeds, '-o', out, '--progress', 'none', *options.split()], check=True, stdout=subprocess.DEVNULL)
            wall = time.perf_counter() - start
            score = json.loads(subprocess.run([sys.executable, zoo / 'zoo.py', 'score', name, out, '--json'], check=True, capture_output=True, text=True).stdout); score.pop('seconds')
            print(f"| {name} | `{options}` | " + ', '.join(f'{k} {v:.4g}' for k, v in score.items()) + f' | {wall:.1f} |', flush=True)


if __name__ == '__main__':
    main()
