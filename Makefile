# The commands of the README. `make PYTHON=python3.12 ...` names another Python, BUILD=cpu|cuda overrides the choice
# that scripts/install.py makes by looking for an NVIDIA GPU, JOBS=N the number of test processes; of the demo
# MODEL=DIR the model, and PREDICTOR=DIR its artifact where that is not in MODEL/dejavu.
PYTHON ?= python3
VENV ?= .venv
BUILD ?= auto
JOBS ?= 2
RUN = $(VENV)/bin/python

.PHONY: help install demo test faults format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     serve examples/opt-books-7m sparsely, beside dense vLLM, and compare; MODEL=DIR another one"
	@echo "make test     run the tests"
	@echo "make faults   plant faults in copies of the code, and see which no test notices; takes an hour"
	@echo "make format   run ruff: the format, and what it can mend"
	@echo "make install  only make $(VENV), which the others do when it is missing or outdated"
	@echo "make clean    delete $(VENV) and what tools left behind"

install: $(VENV)/.installed
	@echo "$(VENV): $$(cat $<)"

$(VENV)/.installed: setup.py scripts/install.py $(wildcard kernels/csrc/*)
	@$(PYTHON) scripts/install.py --venv $(VENV) --build $(BUILD)

demo: install
	@$(RUN) scripts/demo.py $(if $(MODEL),--model $(MODEL)) $(if $(PREDICTOR),--predictor $(PREDICTOR))

test: install
	$(RUN) -m pytest -n $(JOBS)

faults: install
	$(RUN) scripts/plant_faults.py --jobs $(JOBS)

format: install
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/_cpu.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
