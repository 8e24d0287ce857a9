"""python -m train.prepare: makes, imports and checks the data that training reads."""
