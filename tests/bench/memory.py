#!/usr/bin/env python3
"""What every way to learn takes of memory on the language model, within --max-memory and without a bound: one line per run.

    memory.py --tool target/release/onnx-quant --zoo ../shared/zoo --language-model DIR [--max-memory 4G] [--methods brecq,latent] [--free "brecq;latent"] [--ways model] [--others "gptq;cbq"]

DIR is what smollm2.py wrote. Few samples and steps: what is held does not depend on how many steps there are; more
samples may take more, up to the bound. What does not fit, or fails, says why in its row. `blocks` learns block after block (--learn), `model` from what the whole model returns (--distill), holding one block's tape at
a time and running blocks anew on the way back; `others` are all that is no parameterization: layers one by one, in order, by gradients of the model, and what is searched, turned or scaled before. Methods of --free run without a bound as well, to tell what the bound costs in time.
"""
import argparse, os, subprocess, sys, tempfile, time
from pathlib import Path

METHODS = ['brecq', 'scale-aware', 'lora-rounding', 'flexround', 'lrq', 'signround', 'latent', 'latent-stochastic', 'latent-settled', 'talr', 'q-galore', 'discquant']
NORMALIZE = ('infer-shapes, expand-qoperators, absorb-qdq, fold-constants, *(eliminate-identity, fold-gemm-scalars, fold-batch-norm, fold-affine, fold-pad, '
             'fold-constants, infer-shapes, drop-dead), split-gemm, drop-dead, ')


def chain(options='', before=''):
    return ['--pipeline', f'{NORMALIZE}{before}calibrate, assign-encodings{{weights=mse}}, round-in-order' + (f'{{{options}}}' if options else '')]


def plain(method):
    return ['--recipe', 'balanced', '--rounding', method]


def learn(text):
    return ['--recipe', 'best', '--learn', text]


# What else there is: the scheme, and the options.
OTHERS = {
    'nearest': ('w3a16g64', plain('nearest')), 'gptq': ('w3a16g64', plain('gptq')), 'adaround': ('w3a16g64', plain('adaround')),
    'flexround, by layers': ('w3a16g64', plain('flexround')), 'lrq, by layers': ('w3a16g64', plain('lrq')), 'in order': ('w3a16g64', chain()),
    'stakes': ('w3a16g64', chain('stakes=0.5')), 'coupled': ('w3a16g64', chain('coupled=1')), 'adaptive': ('w3a16g64', chain('adaptive=0.5')),
    'norms': ('w3a16g64', chain('norms=1')), 'readers': ('w3a16g64', chain('readers=1')),
    'keep-columns': ('w3a16g64', ['--pipeline', NORMALIZE + 'calibrate, assign-encodings{weights=mse}, keep-columns{share=0.01, by=tacq}, round-in-order{refit=3, damping=0.33}']), 'rotate': ('w3a16g64', chain(before='rotate, infer-shapes, drop-dead, ')),
    'learn-rotation': ('w3a16g64', chain(before='calibrate, learn-rotation, infer-shapes, drop-dead, ')),
    'learn-scaling': ('w3a16g64', chain(before='calibrate, learn-scaling, drop-dead, ')),
    'norm tweaking': ('w3a16g64', learn('latent{iterations=4, batch=4, codes=0, scales=0, biases=0, norms=2, loss=channels}')),
    'cbq': ('w3a16g64', learn('lora-rounding{iterations=4, batch=4, layers=2, window=2, overlap=1, loss=hidden}')),
    'brecq, fisher': ('w3a16g64', learn('brecq{iterations=4, batch=4, loss=fisher}')),
    'qdrop': ('w4a8', learn('brecq{iterations=4, batch=4, drop=0.5, inputs=mixed}')),
    'pd-quant': ('w4a8', learn('brecq{iterations=2, batch=2, layers=28, drop=0.5, loss=pd}')),
    'search-scales': ('w4a8', ['--pipeline', NORMALIZE + 'calibrate, assign-encodings{observer=mse, weights=mse}, round, search-scales{samples=1, candidates=2, layers=28}']),
    'best w8a8': ('w8a8', ['--recipe', 'best']),
}
WAYS = {'blocks': ('--learn', '{iterations=4, batch=4}'), 'model': ('--distill', '{iterations=2, batch=4}')}


def run(command, log):
    """Seconds and megabytes of `command`, or the last line that it says where it fails."""
    start = time.perf_counter()
    with open(log, 'w+') as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said); _, status, usage = os.wait4(process.pid, 0)
        said.seek(0); lines = said.read().splitlines()
    return f'{lines[-1] if lines else "it fails"} | |' if status else f'{time.perf_counter() - start:.0f} | {usage.ru_maxrss * 1.024 / 1000:.0f} |'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo', required=True); p.add_argument('--language-model', required=True)
    p.add_argument('--max-memory', default='4G'); p.add_argument('--samples', default='8'); p.add_argument('--methods', default=','.join(METHODS)); p.add_argument('--free', default='')
    p.add_argument('--ways', default='none,others,blocks,model'); p.add_argument('--others', default=None)
    o = p.parse_args(); zoo = Path(o.zoo).resolve(); model = Path(o.language_model).resolve() / 'smollm2-135m.onnx'
    print('| way | method | bound | seconds | MB |\n|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as tmp:
        feeds = Path(tmp) / 'feeds'
        subprocess.run([sys.executable, zoo / 'zoo.py', 'feeds', 'smollm2', '--out', feeds], check=True, stdout=subprocess.DEVNULL)
        common = [o.tool, 'quantize', model, '--data', feeds, '--samples', o.samples, '--keep-float', 'node_linear_210', '--progress', 'none', '--fresh', '-o', Path(tmp) / 'out.onnx']
        best = ['--scheme', 'w3a16g64', '--recipe', 'best']
        rows = [('none', 'best', best)]
        rows += [('others', name, ['--scheme', scheme, *options]) for name, (scheme, options) in OTHERS.items() if o.others is None or name in o.others.split(';')]
        rows += [(way, method, [*best, option, method + settings]) for way, (option, settings) in WAYS.items() for method in o.methods.split(',')]
        for way, name, options in rows:
            if way not in o.ways.split(','): continue
            for bound in [o.max_memory, *([None] if name in o.free.split(';') else [])]:
                took = run([*common, *options, *(['--max-memory', bound] if bound else [])], Path(tmp) / 'said')
                print(f'| {way} | {name} | {bound or "none"} | {took}', flush=True)


if __name__ == '__main__':
    main()
