# The verbs of this repository. Each sets up what it needs in .venv first; nothing has to be installed by hand
# beyond python3, a C++ compiler, make and git.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# time.process_time: processor seconds on one thread, for a machine that is shared
TIMER ?= time.perf_counter
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)
NATIVE := $(SOURCES) CMakeLists.txt setup.py pyproject.toml

.PHONY: run test nightly sanitize oldest lint format bench gpu docs dist clean

run: $(VENV)/built-train ## the demonstration: half-wrong labels on real digits, without and with the penalty
	$(BIN)/python -m fastfisher.paper.experiments.demo

# One thread for each process, of which there are as many as cores: more would wait for each other.
test: $(VENV)/built-test ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

nightly: $(VENV)/built-test ## 10,000 random cases for each operator and public function, every error at every call
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --hypothesis-profile=nightly tests/test_properties.py tests/test_fuzz.py \
	  tests/test_faults.py tests/test_everything.py tests/ops/test_kernels_compile.py \
	  tests/paper/test_paper_scale.py

# A tree of its own, so that the libraries that everything else uses stay as they are. libasan has to be there before
# Python, and libstdc++ with it, or it finds no function to intercept where an exception is thrown.
SANITIZED := build/sanitized
OPERATOR_TESTS := $(addprefix ops/test_,ops.py rows.py gates.py lists.py norms.py batch_norm.py)
SANITIZED_TESTS := $(addprefix tests/,$(OPERATOR_TESTS) engine/test_gates.py engine/test_batch_norm.py engine/test_convolution.py \
  measure/test_traces.py test_properties.py)

sanitize: $(VENV)/built-test ## the operators' tests with AddressSanitizer and UndefinedBehaviorSanitizer
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -G Ninja -DFASTFISHER_SANITIZE=ON \
	  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -DCMAKE_INSTALL_PREFIX=$(SANITIZED)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitize
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -r fastfisher bench tests pyproject.toml $(SANITIZED)
	rm $(SANITIZED)/fastfisher/*.so
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --install build/sanitize
	cd $(SANITIZED) && \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  "$(CURDIR)/$(BIN)/python" -m pytest -n auto --dist worksteal $(SANITIZED_TESTS)

# What the README promises at its lower end: the package, installed as it says there, beside the oldest torch that
# pyproject.toml names, in an environment and a tree of their own. The sources go once they are installed, so that what
# the tests import is what was installed.
OLDEST := build/oldest
OLDEST_TORCH := torch==$(shell sed -n 's/^dependencies = \["torch>=\(.*\)"\]/\1/p' pyproject.toml)
OLDEST_TESTS := $(addprefix tests/,$(OPERATOR_TESTS) engine/test_calls.py test_labels.py test_model.py penalise/test_function.py \
  penalise/test_regularizer.py engine/test_repeatable.py engine/test_checkpointing.py engine/test_gates.py engine/test_relu_pool.py engine/test_convolution.py \
  engine/test_batch_norm.py engine/test_capture.py measure/test_traces.py engine/test_recurrent.py measure/test_estimate.py engine/test_taylor.py measure/test_hessian.py test_likelihoods.py penalise/test_gradient_penalty.py)

oldest: $(OLDEST)/venv/$(OLDEST_TORCH) ## the tests of operators, penalty and traces with the oldest torch that pyproject.toml names
	rm -rf $(OLDEST)/tree
	mkdir -p $(OLDEST)/tree
	cp -r csrc kernels fastfisher bench tests CMakeLists.txt setup.py pyproject.toml README.md LICENSE $(OLDEST)/tree
	rm -f $(OLDEST)/tree/fastfisher/*.so
	cd $(OLDEST)/tree && PATH="$(CURDIR)/$(OLDEST)/venv/bin:$$PATH" FASTFISHER_BUILD=1 \
	  pip install --quiet --disable-pip-version-check --no-build-isolation .
	rm -r $(OLDEST)/tree/fastfisher
	cd $(OLDEST)/tree && ../venv/bin/fastfisher info && \
	  ../venv/bin/python -m pytest -n auto --dist worksteal $(OLDEST_TESTS)

lint: $(VENV)/built-test ## ruff, clang-format, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(filter csrc/%,$(SOURCES))
	$(BIN)/mypy

format: $(VENV)/built-test ## put the sources into the form that lint wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter csrc/%,$(SOURCES))

# glibc gives freed memory back to the system and faults it in again, page by page: 0 to 20 % of a step, at random. Kept,
# what is measured is the work.
KEEP_MEMORY := MALLOC_TRIM_THRESHOLD_=10000000000 MALLOC_MMAP_THRESHOLD_=10000000000

bench: $(VENV)/peers ## every figure of the README; writes bench/results/
	$(KEEP_MEMORY) $(BIN)/python -m pytest bench --benchmark-disable-gc --benchmark-columns=median,iqr,rounds \
	  --benchmark-timer=$(TIMER)
	$(KEEP_MEMORY) $(BIN)/python -m bench.trace_error
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.readme

gpu: $(VENV)/built-test ## the tests that need a GPU, and every figure that does; writes bench/results/<device>.json
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
	  failed=0; for call in 1 2 3 4; do $(BIN)/python -m bench.gpu --call $$call || failed=1; done; \
	  $(BIN)/python -m bench.readme; exit $$failed; \
	else echo "make gpu: no GPU was found ($$($(BIN)/fastfisher info | grep '^cuda')); nothing was run"; fi

docs: $(VENV)/built-test ## the documentation, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/built-test ## sdist and wheel, in dist/, each installed in an environment of its own and tried there
	rm -rf dist build/lib* build/bdist*
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --no-isolation --sdist --wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.support.distribution

clean:
	rm -rf $(VENV) build dist *.egg-info fastfisher/*.so

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77" cmake ninja pybind11 numpy
	touch $@

# The tests' packages by name: the extra "test" has some that want a newer torch.
$(OLDEST)/venv/$(OLDEST_TORCH):
	rm -rf $(OLDEST)
	$(PYTHON) -m venv $(OLDEST)/venv
	$(OLDEST)/venv/bin/pip install --quiet --disable-pip-version-check "$(OLDEST_TORCH)" "setuptools>=77" cmake ninja \
	  pybind11 numpy scipy scikit-learn pytest pytest-xdist hypothesis
	touch $@

# Isolated, pip would fetch another torch to build against; torch is named again so that what comes with it fits it.
$(VENV)/built-%: $(VENV)/torch $(NATIVE)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation \
	  "$(TORCH)" --editable ".[train$(if $(filter test,$*),$(comma)test$(comma)lint$(comma)docs$(comma)dist)]"
	touch $@ $(VENV)/built-train

# See the extra in pyproject.toml.
$(VENV)/peers: $(VENV)/built-test
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $$($(BIN)/python -c "from importlib.metadata import \
	  requires; print(*[r.split(';')[0] for r in requires('fastfisher') if r.endswith('\"peers\"')])")
	touch $@

comma := ,
