# demo: the main job on any machine. test: everything CI runs but the compatibility run. Both set up their own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# A process per core; the tests of a file stay together, and share what it prepares.
PYTEST := -m pytest -n auto --dist loadfile

.PHONY: demo test test-cpu test-triton test-aten test-emulated test-compat test-newest test-asan check bench gpu gpu-more clean

$(VENV)/ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch setuptools wheel ninja
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[train,dev]'
	touch $@

demo: $(VENV)/ready
	$(RUN) $(BIN)/fastlora demo

test: $(VENV)/ready
	$(MAKE) --no-print-directory test-cpu test-triton test-aten

# csrc on the CPU, and everything that has no second implementation
test-cpu: $(VENV)/ready
	$(RUN) $(BIN)/python $(PYTEST) tests

# the Triton programs, through Triton's interpreter
test-triton: $(VENV)/ready
	$(RUN) TRITON_INTERPRET=1 $(BIN)/python $(PYTEST) --dist worksteal tests/ops

# the ATen compositions that serve where csrc is not built
test-aten: $(VENV)/ready
	$(RUN) FASTLORA_CSRC=0 $(BIN)/python $(PYTEST) --dist worksteal tests/ops

# the host code of the CUDA path on an emulated GPU, the Triton programs through Triton's interpreter
test-emulated: $(VENV)/ready
	$(RUN) TRITON_INTERPRET=1 PYTHONPATH=tests $(BIN)/python $(PYTEST) --dist worksteal -p cuda_emulator --device cuda tests/ops \
		--ignore tests/ops/test_compile.py --ignore tests/ops/test_bf16_interpreter.py \
		-k 'not opcheck and not test_leading_dimensions and not never_asks_the_host'

# the patching tests on the oldest transformers we support
$(VENV)-compat/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)-compat
	$(VENV)-compat/bin/pip install -q -c constraints.txt torch setuptools wheel
	grep -v '^transformers' constraints.txt > $(VENV)-compat/constraints.txt
	FASTLORA_BUILD_CSRC=0 $(VENV)-compat/bin/pip install -q -c $(VENV)-compat/constraints.txt --no-build-isolation \
		-e . transformers==4.57.6 pytest pytest-xdist accelerate
	touch $@

test-compat: $(VENV)-compat/ready
	$(RUN) $(VENV)-compat/bin/python $(PYTEST) tests/patching

# the patching and the trainers' tests on the newest of these that the registry serves, the rest as locked
NEWEST := transformers peft trl accelerate
$(VENV)-newest/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/pip install -q -c constraints.txt torch setuptools wheel
	grep -v $(NEWEST:%=-e '^%=') constraints.txt > $(VENV)-newest/constraints.txt
	FASTLORA_BUILD_CSRC=0 $(VENV)-newest/bin/pip install -q -c $(VENV)-newest/constraints.txt --no-build-isolation \
		-e '.[train,quant]' $(NEWEST) lightning pytest pytest-xdist
	touch $@

# The registry is asked every time: what was newest when the environment was made may not be so today. pip takes an older
# one where the newest does not install beside the rest, and what is there where the registry is silent: both are said.
test-newest: $(VENV)-newest/ready
	$(VENV)-newest/bin/pip install -q --upgrade -c $(VENV)-newest/constraints.txt $(NEWEST)
	@for package in $(NEWEST); do \
		$(VENV)-newest/bin/pip index versions $$package 2>/dev/null | awk -v package=$$package \
			'/INSTALLED:/ {here = $$2} /LATEST:/ {newest = $$2} END { \
			if (!newest) {print package ": the registry does not answer"; exit 1} \
			print package, here (here == newest ? "" : "; " newest " does not install beside the rest")}' || exit 1; \
	done
	$(RUN) $(VENV)-newest/bin/python $(PYTEST) tests/patching tests/trainers

# the C++ kernels built with the address and undefined-behaviour sanitizers, in a copy: every operator's tests. A report
# ends its process and goes to its stderr, which pytest must not capture.
ASAN := build/asan
test-asan: $(VENV)/ready
	rm -rf $(ASAN) && mkdir -p $(ASAN)
	cp -r fastlora csrc tests setup.py pyproject.toml README.md LICENSE $(ASAN)
	cd $(ASAN) && FASTLORA_SANITIZE=1 FASTLORA_BUILD_CSRC=1 $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	cd $(ASAN) && $(RUN) PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		$(CURDIR)/$(BIN)/python $(PYTEST) --dist worksteal -x --capture=sys tests/ops tests/csrc

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# what fastlora gives on this machine, about 15 minutes on two cores
bench: $(VENV)/ready
	$(RUN) $(BIN)/python -m bench
	$(RUN) $(BIN)/python -m bench saved_bytes
	$(RUN) $(BIN)/python -m bench launches
	$(RUN) $(BIN)/python -m bench train_step
	$(RUN) $(BIN)/python -m bench report

# what a GPU must answer, into the folder $$OUT, with the Python at hand: in seven minutes, and then in five more
gpu:
	$(RUN) $(PYTHON) -m bench gpu

gpu-more:
	$(RUN) $(PYTHON) -m bench gpu --more

clean:
	rm -rf $(VENV) $(VENV)-compat $(VENV)-newest build dist *.egg-info fastlora/*.so
