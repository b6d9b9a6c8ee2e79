#!/usr/bin/env python3
"""What more photographs would be worth: efficientnet-lite0 in four bits, fitted to the zoo's calibration pictures, and to those with pictures that it is
judged by, which no user has.

    photographs.py --tool target/release/onnx-quant --zoo ../shared/zoo [--scheme w4a8asym] [--recipe best]

The 96 calibration pictures are parts of some ten photographs; `eval` are 160 parts of others, so that either half shows the same photographs;
`labelled` are 20 photographs of their own. A row per set of pictures that codes are fitted to, with decibels and agreement with float on the first and second
half of `eval` and on `labelled`. Figures in brackets are of pictures that it was fitted to.
"""
import argparse, subprocess, tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

NAME = 'efficientnet-lite0'
MEAN, STD = np.float32([.485, .456, .406]), np.float32([.229, .224, .225])
# Pictures per file, and per run.
RUN = 20


def pictures(folder, parts):
    """Writes `parts` as files of samples."""
    x = np.concatenate(parts); folder.mkdir()
    for at in range(0, len(x), RUN): np.savez(folder / f'{at:04d}.npz', input=x[at:at + RUN])


def outputs(path, x):
    session = ort.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return np.concatenate([session.run(None, {'input': x[at:at + RUN]})[0] for at in range(0, len(x), RUN)])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo', required=True); p.add_argument('--scheme', default='w4a8asym')
    p.add_argument('--recipe', default='best'); o = p.parse_args(); zoo = Path(o.zoo).resolve(); model = zoo / 'models' / f'{NAME}.onnx'
    photos = np.load(zoo / 'data' / 'photos.npz')
    of = {name: np.ascontiguousarray(((photos[name].astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)) for name in ('calib', 'eval', 'labelled')}
    half = len(of['eval']) // 2; judged = {'first half of eval': of['eval'][:half], 'second half of eval': of['eval'][half:], 'labelled': of['labelled']}
    fitted = {'calib': (), 'calib, first half of eval': ('first half of eval',), 'all': tuple(judged)}
    truth = {name: outputs(model, x) for name, x in judged.items()}
    print(f'| {o.scheme}, {o.recipe}, fitted to | {" | ".join(judged)} |\n|---|{"---|" * len(judged)}')
    with tempfile.TemporaryDirectory() as tmp:
        for row, more in fitted.items():
            feeds, out = Path(tmp) / row, Path(tmp) / 'q.onnx'; pictures(feeds, [of['calib'], *(judged[name] for name in more)])
            command = [o.tool, 'quantize', model, '--data', feeds, '-o', out, '--target', 'onnx-qdq', '--scheme', o.scheme, '--recipe', o.recipe, '--progress', 'none']
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            cells = []
            for name, x in judged.items():
                y, q = truth[name], outputs(out, x); db = 10 * np.log10((y ** 2).sum() / ((y - q) ** 2).sum())
                cell = f'{db:.2f} dB, {(y.argmax(1) == q.argmax(1)).mean():.3f}'; cells.append(f'({cell})' if name in more else cell)
            print(f'| {row} | {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
    main()
