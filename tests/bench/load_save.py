#!/usr/bin/env python3
"""A model with external data through `opt --pipeline ""`, in turn with `cp` of its files: medians of wall time, their ratio, peak memory.

    load_save.py --tool target/release/onnx-quant --model smollm2-135m.onnx [--repeat 9]
"""
import argparse, os, shutil, statistics, subprocess, tempfile, time
from pathlib import Path


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--model', required=True); p.add_argument('--repeat', type=int, default=9); o = p.parse_args()
    model = Path(o.model); files = [model] + [f for f in (model.with_name(model.name + '.data'),) if f.exists()]; times = {'ours': [], 'cp': []}; peak = 0
    for turn in range(o.repeat + 1):
        for who in times:
            with tempfile.TemporaryDirectory(dir=model.parent) as tmp:
                os.sync(); start = time.perf_counter()
                if who == 'cp': subprocess.run(['cp', *map(str, files), tmp], check=True)
                else:
                    child = subprocess.Popen([o.tool, 'opt', str(model), '--pipeline', '', '-o', str(Path(tmp) / model.name), '--progress', 'none'])
                    _, status, usage = os.wait4(child.pid, 0); assert status == 0; peak = max(peak, usage.ru_maxrss)
                if turn: times[who].append(time.perf_counter() - start)  # the first turn warms the page cache
    ours, cp = (statistics.median(times[who]) for who in ('ours', 'cp'))
    print(f'{sum(f.stat().st_size for f in files) / 1e6:.0f} MB: ours {ours:.2f} s, cp {cp:.2f} s, ratio {ours / cp:.2f}; peak {peak / 1000:.0f} MB')


if __name__ == '__main__':
    main()
