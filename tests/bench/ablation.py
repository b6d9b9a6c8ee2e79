#!/usr/bin/env python3
"""What each step adds, model by model: a table for CHANGELOG.md.

    ablation.py --tool target/release/onnx-quant --zoo ../shared/zoo [--only NAME] [--scheme w8a8 ...] [--step TEXT] [--language-model DIR]

Runs the zoo's models through pipelines that grow by one step and prints the zoo's own score of each, and the time of the run. The language
model takes part where DIR holds what the zoo's smollm2.py wrote.
"""
import argparse, json, re, subprocess, sys, tempfile, time
from pathlib import Path

# Runs the scorer so that sums do not saturate on processors without VNNI.
PROCESSOR = Path(__file__).resolve().parents[1] / 'consumer/processor.py'
FILES = {'digits-resnet': 'digits-resnet', 'digits-mobilenet': 'digits-mobilenet', 'efficientnet-lite0': 'efficientnet-lite0',
         'magika': 'magika', 'ppocr-rec': 'ppocr-rec', 'minilm': 'minilm-l6'}
ENCODE = 'assign-encodings{observer=mse, products=min-max, weights=WEIGHTS}'
LEAST = ENCODE.replace('}', ', least-db=31}')
STEPS = {
    'w8a8': [('min-max', 'calibrate, assign-encodings{observer=min-max, weights=min-max}, round'),
             ('+ least squares', f'calibrate, {ENCODE}, round'),
             ('+ bias correction', f'calibrate, {ENCODE}, round, correct-bias'),
             ('+ bias correction by training', f'calibrate, {ENCODE}, round, correct-bias{{means=trained}}'),
             ('+ gptq', f'calibrate, {ENCODE}, round{{method=gptq}}, correct-bias'),
             ('+ smooth', f'calibrate, smooth, drop-dead, calibrate, {ENCODE}, round{{method=gptq}}, correct-bias'),
             ('scale-outliers instead', f'calibrate, scale-outliers, drop-dead, calibrate, {ENCODE}, round{{method=gptq}}, correct-bias'),
             ('equalized by weights instead', f'equalize-layers{{from=weights}}, drop-dead, calibrate, {ENCODE}, round{{method=gptq}}, correct-bias'),
             ('and through clamps', f'equalize-layers{{from=weights, clamps=exact}}, drop-dead, calibrate, {ENCODE}, round{{method=gptq}}, correct-bias'),
             ('+ least-db', f'calibrate, smooth, drop-dead, calibrate, {LEAST}, round{{method=gptq}}, correct-bias'),
             ('in order, own weight', f'calibrate, smooth, drop-dead, calibrate, {LEAST}, round-in-order{{target=weight}}'),
             ('in order, float output', f'calibrate, smooth, drop-dead, calibrate, {LEAST}, round-in-order{{target=output}}'),
             ('in order, sum', f'calibrate, smooth, drop-dead, calibrate, {LEAST}, round-in-order'),
             ('+ enumerate', f'calibrate, smooth, drop-dead, calibrate, {LEAST}, round-in-order{{method=enumerate}}'),
             ('+ equalize-layers', f'calibrate, smooth, equalize-layers, drop-dead, calibrate, {LEAST}, round-in-order{{method=enumerate}}')],
    'w4a8': [('nearest', f'calibrate, {ENCODE}, round'),
             ('+ bias correction', f'calibrate, {ENCODE}, round, correct-bias'),
             ('+ bias correction by training', f'calibrate, {ENCODE}, round, correct-bias{{means=trained}}'),
             ('+ gptq', f'calibrate, {ENCODE}, round{{method=gptq}}, correct-bias'),
             ('+ descend', f'calibrate, {ENCODE}, round{{method=gptq}}, descend, correct-bias'),
             ('+ refit-scales', f'calibrate, {ENCODE}, round{{method=gptq}}, descend, refit-scales, correct-bias'),
             ('in order, own weight', f'calibrate, {ENCODE}, round-in-order{{target=weight}}'),
             ('in order, float output', f'calibrate, {ENCODE}, round-in-order{{target=output}}'),
             ('in order, sum', f'calibrate, {ENCODE}, round-in-order'),
             ('+ enumerate', f'calibrate, {ENCODE}, round-in-order{{method=enumerate}}'),
             ('+ refit', f'calibrate, {ENCODE}, round-in-order{{method=enumerate, refit=3}}'),
             ('+ refit, coupled', f'calibrate, {ENCODE}, round-in-order{{method=enumerate, refit=3, coupled=1}}'),
             ('+ equalize-layers', f'calibrate, smooth, equalize-layers, drop-dead, calibrate, {LEAST}, round-in-order{{method=enumerate, refit=3}}'),
             ('+ rotate-bottlenecks', f'calibrate, smooth, equalize-layers, rotate-bottlenecks, infer-shapes, drop-dead, calibrate, {LEAST}, round-in-order{{method=enumerate, refit=3}}'),
             ('adaround instead', f'calibrate, {ENCODE}, round-in-order{{method=adaround}}')],
    'w4a16g32': [('nearest', f'calibrate, {ENCODE}, round'),
                 ('+ gptq', f'calibrate, {ENCODE}, round{{method=gptq}}'),
                 ('+ descend', f'calibrate, {ENCODE}, round{{method=gptq}}, descend'),
                 ('+ refit-scales', f'calibrate, {ENCODE}, round{{method=gptq}}, descend, refit-scales'),
                 ('in order, own weight', f'calibrate, {ENCODE}, round-in-order{{target=weight, refit=3}}'),
                 ('in order, float output', f'calibrate, {ENCODE}, round-in-order{{target=output, refit=3}}'),
                 ('in order, sum', f'calibrate, {ENCODE}, round-in-order{{refit=3}}'),
                 ('awq, in order, sum', f'calibrate, awq, drop-dead, calibrate, {ENCODE}, round-in-order{{refit=3}}'),
                 ('learn-scaling, in order, sum', f'calibrate, learn-scaling, drop-dead, calibrate, {ENCODE}, round-in-order{{refit=3}}'),
                 ('in order, sum, coupled', f'calibrate, {ENCODE}, round-in-order{{refit=3, coupled=1}}'),
                 ('in order, sum, coupled=4', f'calibrate, {ENCODE}, round-in-order{{refit=3, coupled=4}}'),
                 ('in order, sum, stakes 0.5', f'calibrate, {ENCODE}, round-in-order{{refit=3, stakes=0.5}}'),
                 ('in order, sum, readers', f'calibrate, {ENCODE}, round-in-order{{refit=3, coupled=1, readers=1}}'),
                 ('inputs kept in float', f'calibrate, {ENCODE}, keep-columns{{share=0.01}}, round-in-order{{refit=3, coupled=1}}'),
                 ('in order, sum, adaptive 0.25', f'calibrate, {ENCODE}, round-in-order{{refit=3, adaptive=0.25}}'),
                 ('+ augment', f'calibrate, {ENCODE}, round-in-order{{damping=0.2, refit=3}}', '--augment', '8')],
}
STEPS['w3a16g64'] = STEPS['w4a16g32']
FEW = ENCODE.replace('products=min-max', 'products=mse')
IN_ORDER = f'{FEW}, round-in-order{{method=enumerate, refit=3}}'
SMOOTHED = f'smooth, equalize-layers, drop-dead, calibrate, {IN_ORDER}'
STEPS['w4a4'] = [('nearest', f'calibrate, {FEW}, round'),
                 ('+ bias correction', f'calibrate, {FEW}, round, correct-bias'),
                 ('in order, sum', f'calibrate, {IN_ORDER}, correct-bias'),
                 ('+ smooth, equalize-layers', f'calibrate, {SMOOTHED}, correct-bias'),
                 ('+ rotate-inputs', f'calibrate, rotate-inputs, drop-dead, calibrate, {SMOOTHED}, correct-bias'),
                 ('+ defer-softmax', f'calibrate, defer-softmax, rotate-inputs, drop-dead, calibrate, {SMOOTHED}, correct-bias'),
                 ('+ norms bare', f'calibrate, reparameterize-norms{{to=bare}}, defer-softmax, rotate-inputs, drop-dead, calibrate, {SMOOTHED}, correct-bias'),
                 ('+ inputs and sums of 8 bits', 'calibrate, reparameterize-norms{to=bare}, defer-softmax, rotate-inputs, drop-dead, calibrate, '
                  + SMOOTHED.replace('products=mse', 'products=mse, others=8') + ', correct-bias'),
                 ('+ rotate-bottlenecks', 'calibrate, reparameterize-norms{to=bare}, defer-softmax, rotate-inputs, drop-dead, calibrate, '
                  + SMOOTHED.replace('products=mse', 'products=mse, others=8').replace('layers,', 'layers, rotate-bottlenecks, infer-shapes,') + ', correct-bias')]
# Turned, the language model's head is a weight of its own: it stays in float as in the other rows.
ROTATE, HEAD = 'rotate, infer-shapes, drop-dead, calibrate', ('--keep-float', 'node_linear_210')
STEPS['w4a16g128'] = [*STEPS['w4a16g32'][:-1], ('rotate, nearest', f'{ROTATE}, {ENCODE}, round', *HEAD),
                      ('rotate, in order, sum', f'{ROTATE}, {ENCODE}, round-in-order{{refit=3}}', *HEAD),
                      ('learn-rotation, in order, sum', f'calibrate, {ROTATE.replace("rotate", "learn-rotation")}, {ENCODE}, round-in-order{{refit=3}}', *HEAD)]
# Convolutions stay in float where only weights are codes; the language model is for those schemes alone.
ALONE = {'minilm': ('w4a16g32', 'w3a16g64'), 'smollm2': ('w4a16g128',)}


def run(*command):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo', required=True); p.add_argument('--language-model', type=Path)
    p.add_argument('--only'); p.add_argument('--step'); p.add_argument('--scheme', nargs='*', default=list(STEPS))
    o = p.parse_args(); zoo = Path(o.zoo).resolve(); script = zoo / 'zoo.py'
    plain = re.search(r'^(infer-shapes.*?),\ncalibrate', run(o.tool, 'explain', 'ort-cpu'), re.S | re.M).group(1)
    models = {name: zoo / 'models' / f'{file}.onnx' for name, file in FILES.items()}
    if o.language_model: models['smollm2'] = o.language_model / 'smollm2-135m.onnx'
    print('| model | scheme | step | score | seconds |\n|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as tmp:
        for name, model in models.items():
            if o.only and name != o.only: continue
            feeds, out = Path(tmp) / f'{name}.feeds', Path(tmp) / f'{name}.onnx'
            run(sys.executable, script, 'feeds', name, '--out', feeds)
            for scheme in o.scheme:
                if 'a16' in scheme and scheme not in ALONE.get(name, ()) or name == 'smollm2' and 'a16' not in scheme: continue
                for step, passes, *options in STEPS[scheme]:
                    if o.step and step != o.step: continue
                    passes = passes.replace('WEIGHTS', 'min-max' if scheme == 'w8a8' else 'mse'); start = time.perf_counter()
                    run(o.tool, 'quantize', model, '--data', feeds, '-o', out, '--scheme', scheme, '--pipeline', f'{plain}, {passes}', '--progress', 'none', *options)
                    seconds = time.perf_counter() - start
                    score = json.loads(run(sys.executable, PROCESSOR, script, 'score', name, out, '--json', *(('--float', model) if name == 'smollm2' else ())))
                    keep = {k: v for k, v in score.items() if k not in ('seconds', 'bytes')}
                    print(f"| {name} | {scheme} | {step} | " + ', '.join(f'{k} {v:.4g}' for k, v in keep.items()) + f' | {seconds:.1f} |', flush=True)


if __name__ == '__main__':
    main()
