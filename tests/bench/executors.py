#!/usr/bin/env python3
"""How fast and lean each embedded executor calibrates the zoo's models: what the order in `auto` rests on.

    executors.py --tool target/release/onnx-quant --zoo ../shared/zoo [--repeat 3]

Prints, per model, the median wall seconds of the calibrate stage and the peak memory of the run for tract and rten, and their ratio.
"""
import argparse, json, statistics, subprocess, sys, tempfile
from pathlib import Path

from peers import FILES


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo', required=True); p.add_argument('--repeat', type=int, default=3); o = p.parse_args(); zoo = Path(o.zoo).resolve()
    with tempfile.TemporaryDirectory() as tmp:
        for name, file in FILES.items():
            feeds = Path(tmp) / name; row = {}
            subprocess.run([sys.executable, zoo / 'zoo.py', 'feeds', name, '--out', feeds], check=True, stdout=subprocess.DEVNULL)
            for executor in ['rten', 'tract'] * o.repeat:
                r = subprocess.run([o.tool, 'quantize', zoo / 'models' / file, '--data', feeds, '-o', Path(tmp) / 'q.onnx', '--executor', executor, '--progress', 'none', '--json'], capture_output=True, text=True)
                if r.returncode: row.setdefault(executor, []).append(None); continue
                j = json.loads(r.stdout); row.setdefault(executor, []).append((next(s['seconds'] for s in j['stages'] if s['name'] == 'calibrate'), j['peak_rss_bytes'] / 1e6))
            med = {e: None if None in v else [statistics.median(x) for x in zip(*v)] for e, v in row.items()}
            show = lambda e: 'cannot run it' if med[e] is None else f'{med[e][0]:.2f} s, {med[e][1]:.0f} MB'
            ratio = '' if None in med.values() else f'; tract takes {med["tract"][0] / med["rten"][0]:.2f} x the time'
            print(f'{name}: rten {show("rten")}; tract {show("tract")}{ratio}', flush=True)


if __name__ == '__main__':
    main()
