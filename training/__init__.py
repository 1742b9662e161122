"""How models are built, trained, sampled and measured. torch; knows no cluster and no orchestrator."""
