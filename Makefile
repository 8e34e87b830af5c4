# Two commands matter: make demo, make test. Both set up what they need. Everything is Python in hack/; this file only names it.
SHELL := /bin/sh
.DEFAULT_GOAL := help
NAME ?= demo
GPUS ?= 1
SEED ?= 0
EXAMPLES ?= 3000
export PYTHONPATH := operator:exporters:hack
export PYTHONDONTWRITEBYTECODE := 1
# Targets share a machine, a cache and a cluster's name; make -j would only mix their words.
.NOTPARALLEL:
# Evaluated once, when first needed: make help needs no tools.
PY = $(eval PY := $$(shell hack/bootstrap))$(if $(PY),$(PY),$(error the tool environment could not be made))

# A worker for each core, four at most; a file's tests stay together, and so do the servers that they share.
SPREAD = --numprocesses=logical --maxprocesses=4 --dist=loadfile

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  NAME=demo    the cluster's name: clusters stand beside each other"
	@echo "  GPUS=1       nvidia.com/gpu that its node says it has"

.PHONY: demo
demo: ## the main job on a real cluster: export, serve, split, roll back, judge two canaries
	@hack/as-root $(PY) -m demo --name $(NAME)

.PHONY: test
test: lint test-unit test-torch e2e ## everything: lint, unit tests, a whole cluster

.PHONY: up
up: ## a development cluster with everything on it, Perch too
	@hack/as-root $(PY) -m devcluster up --name $(NAME) --gpus $(GPUS)
	@hack/as-root $(PY) -m devcluster.release $(NAME)

.PHONY: down
down: ## remove the cluster NAME, every process and file of it
	@hack/as-root $(PY) -m devcluster down --name $(NAME)

.PHONY: shell
shell: ## a shell with KUBECONFIG, kubectl and helm for the cluster NAME
	@$(PY) -m devcluster shell --name $(NAME)

.PHONY: lint
lint: ## ruff, mypy, import contracts
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy -p perch -p perch_exporter -p devcluster -p demo -p bench -p faults -p chaos -p exports -p fuzz
	@$(dir $(PY))lint-imports

.PHONY: test-unit
test-unit: ## unit tests, and API tests against a real API server
	@hack/as-root $(PY) -m devcluster build etcd kubernetes helm
	@hack/as-root $(PY) -m pytest $(SPREAD) tests/unit tests/api tests/chart

.PHONY: test-torch
test-torch: ## the exporter's tests that need torch, in its image's environment
	@hack/as-root $(PY) hack/torch_tests.py $(SPREAD)

.PHONY: e2e
e2e: ## end-to-end tests on a cluster of their own (NAME=test)
	@hack/as-root $(PY) -m devcluster up --name $${PERCH_TEST_CLUSTER:-test} --gpus 1
	@hack/as-root $(PY) -m pytest tests/e2e -o timeout=1200

.PHONY: e2e-exports
e2e-exports: ## every architecture, format and precision exported, served and asked (an hour or more)
	@hack/as-root $(PY) -m exports

.PHONY: chaos
chaos: ## every fault under live load, counted, on a cluster of its own (long)
	@hack/as-root $(PY) -m chaos

.PHONY: bench
bench: ## measure; the figures go to docs/benchmarks.md by hand
	@hack/as-root $(PY) -m bench --name bench

.PHONY: simulate
simulate: ## how often the judge is wrong, by simulation; fails where alpha is not kept (minutes)
	@$(PY) -m bench.judge

.PHONY: fuzz
fuzz: ## specs that the API server accepts and Perch cannot work with (minutes; SEED=0 EXAMPLES=3000)
	@hack/as-root $(PY) -m devcluster build etcd kubernetes
	@hack/as-root $(PY) -m fuzz --seed $(SEED) --examples $(EXAMPLES)

.PHONY: generate
generate: ## the CRD from the types, the API reference from the CRD
	@$(PY) -m perch.crd > charts/perch/files/modeldeployments.serving.perch.dev.yaml
	@$(PY) hack/apidocs.py > docs/api.md
