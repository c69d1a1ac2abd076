"""The pipeline as Dagster assets, one file a stage: each calls the core and reports metadata."""
