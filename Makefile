# Other names for the commands of dev.py, which needs no make.

.PHONY: demo test lint conformance bench

demo test lint conformance:
	python3 dev.py $@ $(ARGS)

bench:
	python3 dev.py bench $(NAME) $(ARGS)
