"""The paper, one module a chapter. A stage never imports another: they meet only through records and folders."""
