"""``recsys score``: probabilities for a Parquet file of impressions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recsys.commands.options import ArtifactArgument, Features, Json, TrackingUri

if TYPE_CHECKING:
    from feature_store.lookup import DerivedLookup


def score(
    artifact: ArtifactArgument,
    input_path: Annotated[
        Path, typer.Option("--input", "-i", help="Parquet file or folder in the form of the impressions view.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="What to write: the input with probabilities.")],
    features: Features = None,
    views: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Views to compute derived values from, each as it was known at its row's time: what the paths of the "
            "schema are relative to, as data.views of the experiment.",
        ),
    ] = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Score a Parquet file of impressions.

    Derived values that are no columns of the file come from the online store of --features, or are computed from
    --views as the build computes them. Rows of the file count for no value, unless the views hold them.

    \b
    Example:
        recsys score artifacts/din --input tomorrow.parquet --output scored.parquet
        recsys score models:/ranker@champion --input tomorrow.parquet --output scored.parquet
        recsys score artifacts/din_derived --input tomorrow.parquet --output scored.parquet --views data/views
    """  # noqa: D301
    from dataclasses import asdict

    from recsys.commands.terminal import print_facts, print_json
    from serving.loader import check_location
    from serving.output import check_output

    check_location(artifact, tracking_uri=tracking_uri)
    check_output(input_path, output)
    # Takes seconds, for it loads torch: not before what can be told at once has been.
    from serving.batch import score_parquet
    from serving.loader import locate

    found = locate(artifact, tracking_uri=tracking_uri)
    with _derived(views, found.folder) as derived:
        summary = score_parquet(found.folder, input_path, output, features=features, derived=derived, progress=True)
    if as_json:
        print_json(asdict(summary) | {"rows_per_s": summary.rows_per_s})
        return
    print_facts(
        summary.output,
        {
            "rows": summary.rows,
            "columns": ", ".join(summary.columns),
            **({"derived values of the file": ", ".join(summary.given_derived)} if summary.given_derived else {}),
            "rows with an unknown user": summary.rows_with_unknown_user,
            "rows with an unknown item": summary.rows_with_unknown_item,
            "speed": f"{summary.rows_per_s:,.0f} rows/s",
        },
    )


@contextmanager
def _derived(views: str | None, artifact: Path) -> Iterator[DerivedLookup | None]:
    """What computes derived values; None where there are no views to do it from."""
    if views is None:
        yield None
        return
    from feature_store.lookup import derived_lookup
    from recsys.encoding import Encoder

    with derived_lookup(views, Encoder.load(artifact / "encoder")) as lookup:
        yield lookup
