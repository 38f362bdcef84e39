"""Writes the golden kernels anew; read the difference before committing it."""

from tests.goldens.files import rewrite

if __name__ == "__main__":
    for line in rewrite():
        print(line)
