"""What a simulation is made of: its size, its length, and how strong each effect is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Self

from pydantic import Field, field_validator, model_validator

from recsys.config import Config


class SimulatorConfig(Config):
    """A click log of any size with a known answer.

    Sizes that are not given follow from ``num_impressions`` so that ids stay learnable at every size: 64 impressions a
    user, and ``num_impressions ** 0.6`` items (200 thousand impressions: 3,125 users and 1,515 items; 100 million:
    1.6 million users and 63 thousand items).

    Example:
        >>> SimulatorConfig(num_impressions=200_000).resolved().num_items
        1515
    """

    num_impressions: int = Field(200_000, ge=1_000, le=1_000_000_000)
    num_users: int | None = Field(None, ge=10, description="64 impressions a user if not given")
    num_items: int | None = Field(None, ge=120, description="num_impressions ** 0.6 if not given")
    seed: int = Field(0, ge=0, lt=2**63)

    start_time: str = Field(
        "2025-01-06T00:00:00+00:00", description="start of the impressions, ISO 8601 with an offset"
    )
    num_days: int = Field(14, ge=1, le=3650, description="length of the impression log")
    warm_up_days: int = Field(14, ge=1, le=3650, description="events before the first impression")
    warm_up_clicks_per_user: float = Field(30.0, ge=0, le=10_000, description="mean over users")
    new_user_share: float = Field(0.02, ge=0, le=1, description="users without events before the first impression")

    min_candidates: int = Field(10, ge=1, le=1000)
    max_candidates: int = Field(50, ge=1, le=1000)
    retrieved_share: float = Field(
        0.5, ge=0, le=1, description="candidates from the user's interests; the rest by popularity"
    )

    num_categories: int = Field(24, ge=2, le=10_000)
    topics_per_category: int = Field(5, ge=1, le=1000, description="hidden: what an item is about inside its category")
    latent_dim: int = Field(12, ge=2, le=256)
    topic_spread: float = Field(0.4, ge=0, le=10, description="distance of topics from their category's centre")
    item_spread: float = Field(0.25, ge=0, le=10, description="distance of items from their topic")
    popularity_exponent: float = Field(0.8, ge=0, le=3, description="Zipf: weight of rank r is r ** -exponent")

    interest_lifetimes_days: tuple[float, ...] = Field(
        (150.0, 90.0, 60.0, 30.0),
        min_length=1,
        max_length=32,
        description="a user has one interest a value at any time, renewed after about so many days",
    )
    segment_share: float = Field(0.3, ge=0, le=1, description="interests that follow the user's age and gender")

    click_rate: float = Field(0.2, gt=0.001, lt=0.9, description="expected clicks an impression, met by the intercept")
    interest_effect: float = Field(4.6, ge=0, le=50, description="logit of a perfect match with the strongest interest")
    interest_sharpness: float = Field(5.0, gt=0, le=100, description="k of exp(k (cos - 1)): how narrow an interest is")
    item_effect: float = Field(0.5, ge=0, le=10, description="standard deviation of the item's own logit")
    user_effect: float = Field(0.3, ge=0, le=10, description="standard deviation of the user's own logit")
    position_effect: float = Field(0.6, ge=0, le=10, description="logit lost from the first place to the 50th")
    context_effect: float = Field(
        0.25, ge=0, le=10, description="standard deviation of hour x category, device x category"
    )

    missing_rate: float = Field(0.04, ge=0, lt=1, description="null attributes")
    missing_entity_rate: float = Field(0.005, ge=0, lt=1, description="users and items without a row in their view")
    rows_per_file: int = Field(
        4_000_000, ge=10_000, description="larger views are folders of files of about so many rows"
    )

    @field_validator("start_time")
    @classmethod
    def _time_with_offset(cls, text: str) -> str:
        try:
            parsed = datetime.fromisoformat(text)
        except ValueError as err:
            raise ValueError("must be an ISO 8601 time such as 2025-01-06T00:00:00+00:00") from err
        if parsed.tzinfo is None:
            raise ValueError("must have an offset, such as +00:00")
        return text

    @field_validator("interest_lifetimes_days")
    @classmethod
    def _positive(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(v <= 0 for v in values):
            raise ValueError("must be positive, every one")
        return values

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.min_candidates > self.max_candidates:
            raise ValueError(
                f"min_candidates must be at most max_candidates, got {self.min_candidates} > {self.max_candidates}"
            )
        items = self.resolved_num_items
        if items < 2 * self.max_candidates:
            raise ValueError(
                f"num_items must be at least twice max_candidates ({2 * self.max_candidates}), got {items}"
            )
        if items < self.num_topics:
            raise ValueError(
                f"num_items must be at least num_categories x topics_per_category ({self.num_topics}), got {items}"
            )
        return self

    @property
    def num_topics(self) -> int:
        """Topics over all categories."""
        return self.num_categories * self.topics_per_category

    @property
    def resolved_num_users(self) -> int:
        """``num_users``, or what follows from ``num_impressions``."""
        return self.num_users or max(200, self.num_impressions // 64)

    @property
    def resolved_num_items(self) -> int:
        """``num_items``, or what follows from ``num_impressions``."""
        return self.num_items or max(240, int(self.num_impressions**0.6 + 1e-6))

    @property
    def start_time_us(self) -> int:
        """``start_time`` in UTC microseconds."""
        return (datetime.fromisoformat(self.start_time) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)

    def resolved(self) -> SimulatorConfig:
        """The same simulation with every size written out."""
        return self.model_copy(update={"num_users": self.resolved_num_users, "num_items": self.resolved_num_items})
