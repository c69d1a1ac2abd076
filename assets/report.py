"""Metadata that people look at: pictures, tables and numbers of an artifact."""

from typing import Any

import dagster as dg

from nestdiff_core.artifacts import Artifact

SHOWN = 60
SMOOTH_BELOW = 16  # pixels a side


def result(artifact: Artifact, key: dg.AssetKey, **metadata: Any) -> dg.MaterializeResult:
    """The materialisation of an artifact: its content as data version, its place and makers as metadata."""
    return dg.MaterializeResult(
        asset_key=key,
        data_version=dg.DataVersion(data_version(artifact)),
        metadata={
            **{name: value for name, value in metadata.items() if value is not None},
            "path": dg.MetadataValue.path(str(artifact.path)),
            "fingerprint": artifact.fingerprint,
            "digest": artifact.digest,
            "code": artifact.manifest["code_version"],
        },
    )


def data_version(artifact: Artifact) -> str:
    """What should be here and what is here: equal versions mean equal data made by equal configurations."""
    return f"{artifact.fingerprint}.{artifact.digest}"


def picture(png: bytes) -> dg.MetadataValue:
    """A PNG as markdown with the bytes inside; Dagster stores it in the event log, so keep it to tens of kB."""
    from nestdiff_core.evaluation.figures import to_data_url

    return dg.MetadataValue.md(f"![]({to_data_url(png)})")


def grid(images: Any) -> dg.MetadataValue:
    """At most SHOWN images uint8 (N, H, W, C); tiny ones are enlarged smoothly."""
    from nestdiff_core.evaluation.figures import image_grid

    return picture(image_grid(images[:SHOWN], smooth=images.shape[1] <= SMOOTH_BELOW))


def table(rows: list[dict[str, Any]]) -> dg.MetadataValue:
    """Rows of equal keys as a table; text and numbers only."""
    plain = [{k: _cell(v) for k, v in row.items()} for row in rows]
    columns = [dg.TableColumn(name, _kind(plain, name)) for name in rows[0]]
    return dg.MetadataValue.table([dg.TableRecord(row) for row in plain], schema=dg.TableSchema(columns))


def _cell(value: Any) -> int | float | str:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return value if isinstance(value, int) else "-" if value is None else str(value)


def _kind(rows: list[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows]
    if all(isinstance(v, int) for v in values):
        return "int"
    return "float" if all(isinstance(v, (int, float)) for v in values) else "string"
