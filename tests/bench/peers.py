#!/usr/bin/env python3
"""ONNX Runtime's own quantizer and ours in turn, on the zoo, in one run: ratios of wall time, CPU time and peak memory, and the scores.

    peers.py --tool target/release/onnx-quant --zoo ../shared/zoo [--only NAME] [--methods minmax,percentile] [--repeat 3]

With `--methods dynamic` it is `quantize_dynamic`, per channel, without samples, beside `--scheme w8a8dyn`; otherwise
the peer is `quantize_static`, QDQ, per channel, U8/S8, fed the very same samples; models below opset 13 are brought to 17 for it first, by
onnx's version converter. Each run is a process of its own, so that its memory is its own. Medians over --repeat runs; one absolute
time says little on a shared machine, so read the ratios.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path

FILES = {'digits-resnet': 'digits-resnet.onnx', 'digits-mobilenet': 'digits-mobilenet.onnx', 'efficientnet-lite0': 'efficientnet-lite0.onnx',
         'magika': 'magika.onnx', 'ppocr-rec': 'ppocr-rec.onnx', 'minilm': 'minilm-l6.onnx'}

PEER = '''
import sys, glob, numpy as np, onnx
from onnxruntime.quantization import quantize_dynamic, quantize_static, CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType
model, feeds, out, method = sys.argv[1:]
m = onnx.load(model)
if next(o.version for o in m.opset_import if o.domain in ("", "ai.onnx")) < 13:
    from onnx import version_converter
    m = version_converter.convert_version(m, 17); model = out + ".up.onnx"; onnx.save(m, model)
if method == "dynamic": quantize_dynamic(model, out, per_channel=True); sys.exit()
class Reader(CalibrationDataReader):
    def __init__(self): self.files = iter(sorted(glob.glob(feeds + "/*.npz")))
    def get_next(self):
        f = next(self.files, None)
        return None if f is None else dict(np.load(f))
quantize_static(model, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
    weight_type=QuantType.QInt8, calibrate_method={"minmax": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile}[method])
'''


def run(command):
    """(wall s, CPU s, peak MB), or None when it failed."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    return (time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000) if status == 0 else None


def medians(runs):
    return [statistics.median(x) for x in zip(*runs)] if all(runs) else None


def score(zoo, name, model):
    r = subprocess.run([sys.executable, zoo / 'zoo.py', 'score', name, model, '--json'], capture_output=True, text=True)
    return {k: round(v, 4) for k, v in json.loads(r.stdout).items() if k != 'bytes'} if r.returncode == 0 else 'does not load or run'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo', required=True); p.add_argument('--only'); p.add_argument('--methods', default='minmax,percentile'); p.add_argument('--repeat', type=int, default=3)
    o = p.parse_args(); zoo = Path(o.zoo).resolve()
    with tempfile.TemporaryDirectory() as tmp:
        for name, file in FILES.items():
            if o.only and name not in o.only.split(','): continue
            feeds = Path(tmp) / f'{name}.feeds'; model = zoo / 'models' / file; ours = Path(tmp) / f'{name}.ours.onnx'
            subprocess.run([sys.executable, zoo / 'zoo.py', 'feeds', name, '--out', feeds], check=True, stdout=subprocess.DEVNULL)
            methods = o.methods.split(','); options = ['--scheme', 'w8a8dyn'] if methods == ['dynamic'] else ['--data', feeds]; theirs = {m: Path(tmp) / f'{name}.{m}.onnx' for m in methods}; mine, peer = [], {m: [] for m in methods}
            for _ in range(o.repeat):  # in turn, so that the machine's mood is shared
                mine.append(run([o.tool, 'quantize', model, *options, '-o', ours, '--progress', 'none']))
                for m in methods: peer[m].append(run([sys.executable, '-c', PEER, model, feeds, theirs[m], m]))
            w, c, r = medians(mine)
            print(f'{name}: ours {w:.1f} s wall, {c:.1f} s CPU, {r:.0f} MB, score {score(zoo, name, ours)}', flush=True)
            for m in methods:
                got = medians(peer[m])
                if got is None: print(f'  ORT {m}: fails to quantize'); continue
                print(f'  ORT {m}: {got[0]:.1f} s wall, {got[1]:.1f} s CPU, {got[2]:.0f} MB = {got[0] / w:.1f} x wall, {got[1] / c:.1f} x CPU, {got[2] / r:.1f} x memory; score {score(zoo, name, theirs[m])}', flush=True)


if __name__ == '__main__':
    main()
