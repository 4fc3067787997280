"""Which sample owns each row of a batch, and which rows count, for every stream of rows in a model."""
