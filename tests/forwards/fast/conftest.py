from tests.support.projection import projections as projections
