"""Everything that needs a GPU, in four calls of less than nine minutes each: ``make gpu``, or call by call

    python -m bench.gpu --call 1 --out FOLDER    compiles every kernel for this device, then the GPU tests
    python -m bench.gpu --call 2 --out FOLDER    the operators: bandwidth, and against eager PyTorch and torch.compile
    python -m bench.gpu --call 3 --out FOLDER    Tr(F) and training steps, launched and in graphs, and the peers
    python -m bench.gpu --call 4 --out FOLDER    many seeds on one device, then compute-sanitizer

Names of sections after that measure only those. Each figure is written as soon as it is measured, to
``FOLDER/<device>.json``, with a table beside it. A section that is measured again replaces its figures; the others
are kept: those of the file in FOLDER, or, where it has none, of ``bench/results/<device>.json``, which is what is
committed.
``--dry-run`` runs all of it without a GPU, at sizes too small to mean anything.

The package has to be installed, or everything would be measured on its PyTorch reference:

    pip install --no-build-isolation --no-deps -e .

Peers that are missing cost their own figures only. On a machine without a network they come from wheels, fetched
elsewhere and carried along in a folder ``.whl``:

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d .whl opacus==1.6.0 liger-kernel==0.6.4
    pip install --no-index --no-deps --target /tmp/site .whl/*.whl && export PYTHONPATH=/tmp/site

How it is measured is said in :mod:`bench.gpu.timing`, what was promised in :mod:`bench.gpu.bars`. To add a figure,
write a function under ``@case`` in the file of its call.
"""
