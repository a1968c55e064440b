"""The operators as Triton kernels, one file per family; what each file's functions compute is said in reference.py.

Each file has a host function per operator, with the operator's name and signature, and the list ``CONFIGURATIONS`` of
every kernel it can launch. ``python -m fastfisher.kernels.compile`` compiles them all, with or without a GPU.
:mod:`fastfisher.ops` registers the host functions; nothing else imports this package.
"""
