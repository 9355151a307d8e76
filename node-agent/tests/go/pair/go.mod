module pair

go 1.24
