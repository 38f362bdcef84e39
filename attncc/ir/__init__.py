"""The intermediate representation: operators, expressions, programs and plans."""
